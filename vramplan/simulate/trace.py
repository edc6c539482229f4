"""Trace: every block of bytes that lived in a simulated run, from birth to death. No torch here."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from vramplan.memory.birth import Birth
from vramplan.memory.term import Category, Place

CATEGORIES = tuple(Category)
PLACES = tuple(Place)
ALIVE = -1
"""Death of a block that outlives the trace."""


@dataclass(frozen=True, slots=True)
class PhaseSpan:
    """A phase and the instants it spans, ``start`` inclusive and ``end`` exclusive."""

    name: str
    start: int
    end: int

    @property
    def is_step(self) -> bool:
        return self.name.startswith("step")


@dataclass(slots=True)
class Trace:
    """Blocks by number, in order of birth. An instant is the number of one allocation or one free.

    ``category`` and ``place`` index ``CATEGORIES`` and ``PLACES``; ``birth`` indexes ``births``; ``stream`` is 0 for
    the stream that computes.
    """

    num_bytes: array[int] = field(default_factory=lambda: array("q"))
    born_at: array[int] = field(default_factory=lambda: array("q"))
    died_at: array[int] = field(default_factory=lambda: array("q"))
    birth: array[int] = field(default_factory=lambda: array("i"))
    category: array[int] = field(default_factory=lambda: array("b"))
    place: array[int] = field(default_factory=lambda: array("b"))
    stream: array[int] = field(default_factory=lambda: array("b"))
    births: list[Birth] = field(default_factory=list)
    phases: list[PhaseSpan] = field(default_factory=list)
    cache_emptied_at: list[int] = field(default_factory=list)
    """Instants before which the engine called ``empty_cache``."""
    num_instants: int = 0

    def __len__(self) -> int:
        return len(self.num_bytes)

    def bear(
        self,
        num_bytes: int,
        birth: int,
        place: Place = Place.DEVICE,
        stream: int = 0,
        category: Category = Category.TEMPORARY,
    ) -> int:
        """Appends a block born now; its number."""
        self.num_bytes.append(num_bytes)
        self.born_at.append(self.num_instants)
        self.died_at.append(ALIVE)
        self.birth.append(birth)
        self.category.append(_CATEGORY_NUMBER[category])
        self.place.append(_PLACE_NUMBER[place])
        self.stream.append(stream)
        self.num_instants += 1
        return len(self.num_bytes) - 1

    def move(self, block: int, place: Place) -> None:
        """The block was born in another place than was thought."""
        self.place[block] = _PLACE_NUMBER[place]

    def bury(self, block: int) -> None:
        """The block dies now."""
        self.died_at[block] = self.num_instants
        self.num_instants += 1

    def in_place(self, place: Place) -> npt.NDArray[np.bool_]:
        """Which blocks are there."""
        found: npt.NDArray[np.bool_] = np.array(self.place, np.int8) == _PLACE_NUMBER[place]
        return found

    def in_category(self, category: Category) -> npt.NDArray[np.bool_]:
        """Which blocks are of this category."""
        found: npt.NDArray[np.bool_] = np.array(self.category, np.int8) == CATEGORIES.index(category)
        return found

    def live_curve(self, chosen: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
        """Bytes of the chosen blocks that are alive after each instant (element 0: before the first)."""
        sizes, born, died = self._times()
        deltas = np.zeros(self.num_instants + 1, np.int64)
        np.add.at(deltas, born[chosen] + 1, sizes[chosen])
        dead = chosen & (died != ALIVE)
        np.subtract.at(deltas, died[dead] + 1, sizes[dead])
        return np.cumsum(deltas)

    def live_at(self, instant: int, place: Place = Place.DEVICE) -> npt.NDArray[np.int64]:
        """Numbers of the blocks alive after ``instant`` instants."""
        _, born, died = self._times()
        return np.flatnonzero(self.in_place(place) & (born < instant) & ((died == ALIVE) | (died >= instant)))

    def events(self, place: Place | None = Place.DEVICE) -> Iterator[tuple[int, int, bool]]:
        """(instant, block, is it a birth) in order of time; None: in all places."""
        blocks = np.arange(len(self)) if place is None else np.flatnonzero(self.in_place(place))
        _, born, died = (times[blocks] for times in self._times())
        dead = died != ALIVE
        when = np.concatenate([born, died[dead]])
        who = np.concatenate([blocks, blocks[dead]])
        is_birth = np.concatenate([np.ones(len(born), bool), np.zeros(int(dead.sum()), bool)])
        order = np.argsort(when, kind="stable")
        yield from zip(when[order].tolist(), who[order].tolist(), is_birth[order].tolist(), strict=True)

    def _times(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        return np.array(self.num_bytes, np.int64), np.array(self.born_at, np.int64), np.array(self.died_at, np.int64)


_PLACE_NUMBER = {place: number for number, place in enumerate(PLACES)}
_CATEGORY_NUMBER = {category: number for number, category in enumerate(CATEGORIES)}
