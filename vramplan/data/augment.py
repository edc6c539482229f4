"""Changes to what the model is shown in training: dropped tokens, and noise on embeddings. Targets stay."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from vramplan.data.sample import Sample


@dataclass(frozen=True, slots=True)
class TokenDropout:
    """Shown tokens are replaced by ``replacement`` with chance ``rate`` (word dropout, Bowman et al. 2016,
    arXiv:1511.06349); ``kept`` ids never are."""

    rate: float
    replacement: int
    kept: frozenset[int]
    seed: int

    def apply(self, sample: Sample, step: int, index: int) -> Sample:
        """The sample as step ``step`` shows it: the same on every rank and after a resume."""
        random = np.random.RandomState(np.random.MT19937(np.random.SeedSequence([self.seed, step, index])))
        dropped = random.random_sample(sample.num_tokens) < self.rate
        dropped &= ~np.isin(sample.ids, list(self.kept))
        return replace(sample, shown=np.where(dropped, self.replacement, sample.ids))


def token_dropout(rate: float, tokenizer: Any, seed: int) -> TokenDropout | None:
    """The dropout that a spec asks for: special tokens stay, dropped ones become the unknown or the padding token."""
    if rate == 0:
        return None
    known = (tokenizer.unk_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id)
    replacement = next((token for token in known if token is not None), 0)
    special: Collection[int] = tokenizer.all_special_ids
    return TokenDropout(rate, replacement, frozenset(special), seed)


def add_embedding_noise(module: torch.nn.Module, alpha: float) -> torch.utils.hooks.RemovableHandle:
    """NEFTune (Jain et al. 2023, arXiv:2310.05914): in training, embeddings (batch, length, width) get uniform noise of
    +-alpha / sqrt(length x width). Passes without gradients (a reference model's) get none.

    The noise comes from torch's generator, which a run seeds for each (step, micro-batch, rank).
    """

    def noisy(embedding: torch.nn.Module, _inputs: Any, embedded: torch.Tensor) -> torch.Tensor:
        if not embedding.training or not torch.is_grad_enabled():
            return embedded
        bound = alpha / math.sqrt(embedded.shape[-2] * embedded.shape[-1])
        return embedded + torch.empty_like(embedded).uniform_(-bound, bound)

    embeddings: torch.nn.Module = module.get_input_embeddings()  # type: ignore[operator]
    return embeddings.register_forward_hook(noisy)
