"""The samples of a run: what is trained on, what is held out, and what reading them found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from vramplan.data.encode import Sample, encode_rows
from vramplan.data.row import Conversation
from vramplan.data.sampler import permutation
from vramplan.data.source import read_rows
from vramplan.data.template import ensure_template
from vramplan.errors import DataError
from vramplan.spec.run import RunSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_HOLDOUT_EPOCH = 2**31
"""An epoch number that no training reaches: the held-out part is drawn from a stream of its own."""


@dataclass(frozen=True, slots=True)
class RunData:
    """Samples to train on and to evaluate on; ``notes``: sentences that the user should read."""

    train: tuple[Sample, ...]
    held_out: tuple[Sample, ...]
    notes: tuple[str, ...] = ()


def load_data(run: RunSpec, tokenizer: PreTrainedTokenizerBase) -> RunData:
    """Reads and encodes what a run is trained and evaluated on.

    Raises:
        DataError: a row is malformed, or the held-out part takes every row.
    """
    spec, notes = run.data, []
    rows = read_rows(spec.train)
    if isinstance(rows[0], Conversation) and ensure_template(tokenizer):
        notes.append("the tokenizer has no chat template: turns are written as <|role|>, content, end of sequence")
    samples = encode_rows(rows, tokenizer, run.seq_len, spec.train_on)
    notes += _cut_note(samples, run.seq_len)
    if spec.eval is not None:
        named = encode_rows(read_rows(spec.eval), tokenizer, run.seq_len, spec.train_on)
        return RunData(tuple(samples), tuple(named), tuple(notes))
    train, held_out = split(samples, spec.eval_frac, run.training.seed)
    return RunData(train, held_out, tuple(notes))


def split(samples: Sequence[Sample], eval_frac: float, seed: int) -> tuple[tuple[Sample, ...], tuple[Sample, ...]]:
    """(training, held-out) samples: ``eval_frac`` of them, at least one, drawn by the seed; both keep their order.

    Raises:
        DataError: nothing would be left to train on.
    """
    if eval_frac == 0:
        return tuple(samples), ()
    num_held_out = max(1, round(eval_frac * len(samples)))
    if num_held_out >= len(samples):
        raise DataError(
            f"data.eval_frac {eval_frac} holds out all of {len(samples)} samples: lower it, or name data.eval"
        )
    chosen = set(permutation(seed, _HOLDOUT_EPOCH, len(samples))[:num_held_out].tolist())
    train = tuple(sample for index, sample in enumerate(samples) if index not in chosen)
    return train, tuple(sample for index, sample in enumerate(samples) if index in chosen)


def _cut_note(samples: Sequence[Sample], seq_len: int) -> list[str]:
    num_cut = sum(sample.num_cut > 0 for sample in samples)
    if not num_cut:
        return []
    longest = int(np.max([sample.num_tokens + sample.num_cut for sample in samples]))
    return [f"{num_cut} of {len(samples)} rows were cut to seq_len {seq_len}; the longest has {longest} tokens"]
