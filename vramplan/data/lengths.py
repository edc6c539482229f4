"""How long sequences are: what the planner must make room for, and what share of it is padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vramplan.data.sample import Sample

_NUM_BARS = 8


@dataclass(frozen=True, slots=True)
class Lengths:
    """``edges`` and ``counts``: a histogram of the sequences' tokens (``counts[i]`` between edges i and i + 1)."""

    num_sequences: int
    num_rows: int
    """Documents in them; more than sequences where they are packed."""
    num_tokens: int
    num_targets: int
    longest: int
    seq_len: int
    edges: tuple[int, ...]
    counts: tuple[int, ...]

    @property
    def planned_seq_len(self) -> int:
        """Tokens of the longest batch that can come: the longest sequence rounded up to a multiple of 8."""
        return min(self.seq_len, -(-self.longest // 8) * 8)

    @property
    def padding_frac(self) -> float:
        """Share of padding if every sequence is padded to ``planned_seq_len`` (an upper bound: batches are padded to
        their own longest)."""
        return 1 - self.num_tokens / (self.num_sequences * self.planned_seq_len)

    def notes(self) -> list[str]:
        if self.planned_seq_len >= self.seq_len:
            return []
        return [
            f"the longest sequence has {self.longest} tokens: seq_len {self.planned_seq_len} is enough "
            f"(it is {self.seq_len})"
        ]


def measure_lengths(sources: Sequence[Sequence[Sample]], held_out: Sequence[Sample], seq_len: int) -> Lengths:
    """The histogram over all sequences of the sources; ``held_out`` counts for the longest only."""
    lengths: list[int] = []
    num_rows = num_targets = 0
    for samples in sources:
        for sample in samples:
            lengths.append(sample.num_tokens)
            num_targets += sample.num_targets
            num_rows += len(sample.doc_lengths) or 1
    longest = max(lengths)
    edges = np.unique(np.linspace(0, longest, _NUM_BARS + 1).round().astype(int))
    counts, _ = np.histogram(lengths, bins=edges)
    return Lengths(
        len(lengths),
        num_rows,
        sum(lengths),
        num_targets,
        max([longest, *(sample.num_tokens for sample in held_out)]),
        seq_len,
        tuple(edges.tolist()),
        tuple(counts.tolist()),
    )
