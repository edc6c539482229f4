"""The shares of several sources in every global batch, in closed form.

Of the first ``n`` sequences of a run each source gives a fixed number, got by splitting ``n`` between the first source
and the rest, the rest between the second and its rest, and so on, each time rounding down with exact fractions. What a
step takes is the difference between the numbers after and before it. So the shares need no memory, no randomness and
no knowledge of ranks or micro-batches, every batch is full, and the first source (``replay``, if there is one) is never
a whole sequence off its share at any step.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from vramplan.data.hard import Mining
from vramplan.data.sampler import permutation

_BATCH_ORDER = 2**32 - 1
"""A source's number that none has: order within batches is drawn from a stream of its own."""


@dataclass(frozen=True, slots=True)
class Part:
    """A source's samples: the ids ``first`` to ``first + size - 1``, and its ``share`` of all sequences."""

    name: str
    first: int
    size: int
    share: Fraction
    is_replay: bool = False


def counts_of_first(num_sequences: int, shares: Sequence[Fraction]) -> tuple[int, ...]:
    """How many of a run's first ``num_sequences`` each source gives; the shares add up to 1."""
    counts, left, share_left = [], num_sequences, Fraction(1)
    for share in shares[:-1]:
        count = int(left * share / share_left) if share_left else 0
        counts.append(count)
        left, share_left = left - count, share_left - share
    return (*counts, left)


def exact_shares(weights: Sequence[float]) -> tuple[Fraction, ...]:
    """Weights as fractions that add up to 1; 0.1 means one tenth."""
    exact = [Fraction(str(weight)) for weight in weights]
    return tuple(weight / sum(exact) for weight in exact)


def make_parts(
    names: Sequence[str], sizes: Sequence[int], weights: Sequence[float] | None, replay: tuple[str, int, float] | None
) -> tuple[Part, ...]:
    """The parts of a run in the order of their ids: the sources, then ``replay`` (name, size, share).

    ``weights`` None: sources share by their sizes.
    """
    shares = exact_shares(weights if weights is not None else [float(size) for size in sizes])
    replay_share = Fraction(0) if replay is None else Fraction(str(replay[2]))
    firsts = np.concatenate([[0], np.cumsum(sizes)]).tolist()
    parts = tuple(
        Part(name, first, size, share * (1 - replay_share))
        for name, first, size, share in zip(names, firsts, sizes, shares, strict=False)
    )
    if replay is None:
        return parts
    return (*parts, Part(replay[0], int(firsts[-1]), replay[1], replay_share, is_replay=True))


@dataclass(frozen=True, slots=True)
class Stream:
    """Which samples an optimizer step sees, of all sources: a pure function of seed and step."""

    parts: tuple[Part, ...]
    seed: int
    mining: Mining | None = None
    """Draws the sources' epochs after the first by loss; None: every epoch is a permutation."""

    def batch(self, step: int, batch_size: int) -> tuple[int, ...]:
        """Ids, in order, of the samples of optimizer step ``step`` (from 0)."""
        ids: list[int] = []
        for number, (start, stop) in self.positions(step, batch_size).items():
            part = self.parts[number]
            ids += [part.first + self.sample_at(number, position, batch_size) for position in range(start, stop)]
        if len(self.parts) == 1:
            return tuple(ids)
        order = permutation(self.seed, step, len(ids), _BATCH_ORDER)  # so that each rank gets of every source
        return tuple(ids[index] for index in order)

    def positions(self, step: int, batch_size: int) -> dict[int, tuple[int, int]]:
        """By part: the half-open range of positions of its endless row of epochs that the step takes."""
        turn = sorted(range(len(self.parts)), key=lambda number: not self.parts[number].is_replay)
        shares = [self.parts[number].share for number in turn]
        before, after = (counts_of_first(steps * batch_size, shares) for steps in (step, step + 1))
        return {number: (before[rank], after[rank]) for rank, number in enumerate(turn)}

    def sample_at(self, number: int, position: int, batch_size: int) -> int:
        """The sample, counted within its part, at a position of the part's endless row of epochs."""
        part = self.parts[number]
        epoch, offset = divmod(position, part.size)
        if self.mining is None or epoch == 0 or part.is_replay:
            return int(permutation(self.seed, epoch, part.size, number)[offset])
        first_step = self.step_of(number, epoch * part.size, batch_size)
        return int(self.mining.order(number, epoch, part.first, part.size, first_step)[offset])

    def step_of(self, number: int, position: int, batch_size: int) -> int:
        """The step that takes a position of a part."""
        high = 1
        while self.positions(high, batch_size)[number][1] <= position:
            high *= 2
        return bisect_right(range(high + 1), position, key=lambda step: self.positions(step, batch_size)[number][1])

    def steps_of_epochs(self, epochs: float, batch_size: int) -> int:
        """Steps in which as many sequences as ``epochs`` times all of the sources, replay aside, are seen."""
        wanted = Fraction(round(epochs * self._num_domain))
        return max(1, math.ceil(wanted / (batch_size * self._domain_share)))

    def epoch_of(self, step: int, batch_size: int) -> int:
        """The epoch, by the sequences seen of the sources (replay aside), in which the step begins."""
        return int(step * batch_size * self._domain_share / self._num_domain)

    @property
    def _num_domain(self) -> int:
        return sum(part.size for part in self.parts if not part.is_replay)

    @property
    def _domain_share(self) -> Fraction:
        return 1 - sum((part.share for part in self.parts if part.is_replay), Fraction(0))


def counts_text(parts: Sequence[Part]) -> str:
    """The sources, their sizes and shares of the run, for a note."""
    return ", ".join(
        f"{part.name} {part.size:,} sequences, {float(part.share):.1%} of all that are drawn" for part in parts
    )
