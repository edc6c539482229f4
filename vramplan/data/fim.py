"""Fill-in-the-middle: documents rearranged so that a causal model learns to fill gaps (Bavarian et al. 2022,
arXiv:2207.14255).

A piece of text is cut at two random characters into prefix, middle and suffix, and written as
``PRE prefix SUF suffix MID middle`` (PSM) or ``PRE SUF suffix MID prefix middle`` (SPM, the paper's appendix D, which
keeps prefix and middle in one stretch). Every token is learnt, the markers too, as in the paper.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from vramplan.data.row import Text
from vramplan.data.sample import Sample
from vramplan.errors import DataError
from vramplan.spec.data import FimSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARKERS = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen2.5-Coder, CodeGemma
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder 1 and 2
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),  # SantaCoder
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # DeepSeek-Coder: PRE, SUF, MID
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),  # Code Llama
)
"""Names of the tokens PRE, SUF and MID in public tokenizers."""
_NUM_MARKERS = 3


@dataclass(frozen=True, slots=True)
class Fim:
    """How often, and the ids of the three markers."""

    rate: float
    spm_rate: float
    prefix_id: int
    suffix_id: int
    middle_id: int


def fim_of(spec: FimSpec, tokenizer: PreTrainedTokenizerBase) -> Fim:
    """The markers of a tokenizer.

    Raises:
        DataError: it has none.
    """
    vocabulary = tokenizer.get_vocab()
    for names in MARKERS:
        if all(name in vocabulary for name in names):
            prefix, suffix, middle = (vocabulary[name] for name in names)
            return Fim(spec.rate, spec.spm_rate, prefix, suffix, middle)
    raise DataError(
        "data.fim: the tokenizer has no fill-in-the-middle tokens (such as <|fim_prefix|>); choose a model that has "
        "them, or leave data.fim out"
    )


def fim_samples(row: Text, tokenizer: PreTrainedTokenizerBase, seq_len: int, fim: Fim, seed: int) -> Iterator[Sample]:
    """The document in pieces that fit into ``seq_len`` tokens, ``fim.rate`` of them rearranged. Cuts are between
    characters, before tokens are made, so that the model meets words cut anywhere (the paper's section 3.1)."""
    random = np.random.RandomState(np.random.MT19937(np.random.SeedSequence(seed)))
    for piece, is_last in _pieces(row.text, tokenizer, seq_len - _NUM_MARKERS - 1):
        chosen, is_spm = random.random_sample(2) < (fim.rate, fim.spm_rate)
        cuts = sorted(random.randint(0, len(piece) + 1, size=2))
        ids = _rearranged(piece, cuts, tokenizer, fim, is_spm=bool(is_spm)) if chosen else _ids(piece, tokenizer)
        if is_last and tokenizer.eos_token_id is not None:
            ids.append(tokenizer.eos_token_id)
        kept = np.asarray(ids[:seq_len], dtype=np.int64)  # cut words can make a few more tokens than whole ones
        if len(kept) > 1:
            num_cut = max(0, len(ids) - seq_len)
            yield Sample(row.where, kept, np.ones(len(kept), dtype=np.bool_), num_cut, row.weight)


def _pieces(text: str, tokenizer: PreTrainedTokenizerBase, most_tokens: int) -> Iterator[tuple[str, bool]]:
    """The text cut between tokens into pieces of at most ``most_tokens``, and whether each is the last."""
    if most_tokens < 1:
        raise DataError("data.fim: seq_len leaves no room for text beside the markers; raise it")
    starts = [
        start for start, _ in tokenizer(text, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
    ]
    edges = [*(starts[index] for index in range(0, len(starts), most_tokens)), len(text)]
    edges[0] = 0
    for number, (start, end) in enumerate(pairwise(edges), start=2):
        yield text[start:end], number == len(edges)


def _rearranged(text: str, cuts: list[int], tokenizer: PreTrainedTokenizerBase, fim: Fim, *, is_spm: bool) -> list[int]:
    prefix, middle, suffix = text[: cuts[0]], text[cuts[0] : cuts[1]], text[cuts[1] :]
    after = [fim.suffix_id, *_ids(suffix, tokenizer), fim.middle_id]
    if is_spm:
        return [fim.prefix_id, *after, *_ids(prefix, tokenizer), *_ids(middle, tokenizer)]
    return [fim.prefix_id, *_ids(prefix, tokenizer), *after, *_ids(middle, tokenizer)]


def _ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []
