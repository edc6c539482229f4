"""What a model with more layers does more often: from the events of two depths those of any depth. No torch here.

Where one cycle of layers more inserts stretches that repeat what stands before them, ``k`` cycles more insert each
stretch ``k`` times; every number counts on as it did from one to the other (layer 7, 8, 9; bytes of a flat buffer).
Whether that holds is not assumed: the events of a third depth must come out exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vramplan.simulate.events import Events

_Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Stretch:
    """``length`` events that the longer sequence has more, before event ``at`` of the shorter one (``at_longer`` of
    the longer one). They are of the kinds of the ``length`` events before them."""

    at: int
    at_longer: int
    length: int


def inserted_stretches(shorter: Events, longer: Events) -> tuple[Stretch, ...] | None:
    """Where the longer sequence repeats what the shorter one does once less; None where it is not so."""
    first, second = shorter.kinds, longer.kinds
    found: list[Stretch] = []
    i = j = 0
    while True:
        same = _common(first[i:], second[j:])
        i, j = i + same, j + same
        if i == len(first) and j == len(second):
            return tuple(found)
        length = _length_of_repeat(first, second, i, j)
        if not length or (found and i - length < found[-1].at):
            return None
        found.append(Stretch(i, j, length))
        j += length


def _length_of_repeat(first: _Ints, second: _Ints, i: int, j: int) -> int:
    """How long the stretch is that begins at ``j`` and repeats what is before it: the one after which the two
    sequences go on together for longest. 0: there is none."""
    budget = min((len(second) - j) - (len(first) - i), i, j)
    if budget < 1:
        return 0
    best, furthest = 0, -1
    for length in (np.flatnonzero(second[j - budget : j][::-1] == second[j : j + 1]) + 1).tolist():
        if not np.array_equal(second[j : j + length], second[j - length : j]):
            continue
        together = _common(first[i:], second[j + length :])
        if together > furthest:
            best, furthest = length, together
        if i + together == len(first) and j + length + together == len(second):
            return length
    return best


def _common(first: _Ints, second: _Ints) -> int:
    """How many elements are the same from the start on."""
    length = min(len(first), len(second))
    differ = first[:length] != second[:length]
    return int(differ.argmax()) if differ.any() else length


@dataclass(frozen=True, slots=True)
class Law:
    """How a sequence of events grows: ``shorter`` with every stretch inserted once is ``longer``."""

    shorter: Events
    longer: Events
    stretches: tuple[Stretch, ...]

    def after(self, times: int) -> Events:
        """The events with every stretch inserted ``times`` times."""
        kinds, offsets = self.shorter.kinds, self.shorter.offsets
        fixed = self.shorter.values + (self._kept() - self.shorter.values) * times
        lengths = np.diff(offsets)
        all_kinds, all_lengths, all_values = [], [], []
        done = 0
        for stretch in self.stretches:
            before = slice(stretch.at - stretch.length, stretch.at)
            values = slice(offsets[before.start], offsets[before.stop])
            all_kinds += [kinds[done : stretch.at], np.tile(kinds[before], times)]
            all_lengths += [lengths[done : stretch.at], np.tile(lengths[before], times)]
            counted = np.arange(1, times + 1)[:, None] * self.growth(stretch)
            all_values += [fixed[offsets[done] : values.stop], (fixed[values] + counted).ravel()]
            done = stretch.at
        all_kinds.append(kinds[done:])
        all_lengths.append(lengths[done:])
        all_values.append(fixed[offsets[done] :])
        ends = np.cumsum(np.concatenate([np.zeros(1, np.int64), *all_lengths]))
        return Events(np.concatenate(all_kinds), ends, np.concatenate(all_values))

    def growth(self, stretch: Stretch) -> _Ints:
        """By how much each number of a stretch is larger than where it stood before."""
        offsets, values = self.longer.offsets, self.longer.values
        start, middle, end = (offsets[stretch.at_longer + step * stretch.length] for step in (-1, 0, 1))
        grown: _Ints = values[middle:end] - values[start:middle]
        return grown

    def _kept(self) -> _Ints:
        """The longer sequence's numbers of the events that the shorter one has too."""
        kept = np.ones(len(self.longer), bool)
        for stretch in self.stretches:
            kept[stretch.at_longer : stretch.at_longer + stretch.length] = False
        values: _Ints = self.longer.values[np.repeat(kept, np.diff(self.longer.offsets))]
        return values


def law_of(shorter: Events, longer: Events, longest: Events) -> Law | None:
    """The law by which the three follow each other; None where there is none."""
    stretches = inserted_stretches(shorter, longer)
    if stretches is None:
        return None
    law = Law(shorter, longer, stretches)
    return law if law.after(2).equals(longest) else None
