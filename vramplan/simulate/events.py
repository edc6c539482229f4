"""A trace as a sequence of events that can be laid beside the trace of a deeper model, and back. No torch here.

An event is a kind and a few numbers. The kind is what stays the same from layer to layer (operator, lines of code,
category, stream, names with their numbers taken out); the numbers are what counts up: those in the names of module
and phase, the bytes, and of a death the rank of the block that dies among those alive that are told apart by nothing
else.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from vramplan.memory.birth import Birth
from vramplan.simulate.trace import CATEGORIES, PLACES, PhaseSpan, Trace

_DIGITS = re.compile(r"\d+")
_BIRTH, _DEATH, _START, _END, _EMPTIED, _NOTE = "birth", "death", "start", "end", "emptied", "note"
_Key = tuple[int, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Note:
    """A number that the engine carries from layer to layer, read at an instant."""

    instant: int
    name: str
    value: int


@dataclass(frozen=True, slots=True)
class Pattern:
    """A birthplace with its numbers taken out."""

    op: str
    node: str
    frame: str
    outer_frame: str
    module: str
    phase: str

    @classmethod
    def of(cls, birth: Birth) -> tuple[Pattern, tuple[int, ...]]:
        module, module_numbers = _without_numbers(birth.module)
        phase, phase_numbers = _without_numbers(birth.phase)
        return cls(birth.op, birth.node, birth.frame, birth.outer_frame, module, phase), module_numbers + phase_numbers

    def filled(self, numbers: Sequence[int]) -> Birth:
        found = iter(numbers)
        module, phase = _with_numbers(self.module, found), _with_numbers(self.phase, found)
        return Birth(self.op, self.node, module, self.frame, self.outer_frame, phase)


@dataclass(frozen=True, slots=True)
class BlockKind:
    """What a block keeps from layer to layer; ``num_bytes`` where blocks of this size are in every trace."""

    pattern: Pattern
    category: int
    place: int
    stream: int
    num_bytes: int | None


@dataclass(slots=True)
class Kinds:
    """Numbers for kinds of events, the same for all the traces that are compared."""

    known: list[tuple[str, Hashable]] = field(default_factory=list)
    _number: dict[tuple[str, Hashable], int] = field(default_factory=dict)

    def number(self, what: str, of: Hashable = None) -> int:
        key = (what, of)
        found = self._number.get(key)
        if found is None:
            found = self._number[key] = len(self.known)
            self.known.append(key)
        return found

    def are_notes(self, kinds: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Which of these kinds are notes."""
        return np.array([what == _NOTE for what, _ in self.known], bool)[kinds]


@dataclass(frozen=True, slots=True)
class Events:
    """Event ``i`` is of kind ``kinds[i]`` and has the numbers ``values[offsets[i]:offsets[i + 1]]``."""

    kinds: npt.NDArray[np.int64]
    offsets: npt.NDArray[np.int64]
    values: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.kinds)

    @classmethod
    def of(cls, events: Sequence[_Key]) -> Events:
        lengths = np.array([0, *(len(numbers) for _, numbers in events)], np.int64)
        values = np.array([number for _, numbers in events for number in numbers], np.int64)
        return cls(np.array([kind for kind, _ in events], np.int64), np.cumsum(lengths), values)

    def equals(self, other: Events) -> bool:
        return bool(np.array_equal(self.kinds, other.kinds) and np.array_equal(self.values, other.values))


def read_events(traces: Sequence[Trace], notes: Sequence[Sequence[Note]]) -> tuple[Kinds, tuple[Events, ...]]:
    """The events of traces that are to be compared, with one numbering of their kinds."""
    kinds = Kinds()
    readings = [_Reading(trace, noted) for trace, noted in zip(traces, notes, strict=True)]
    sizes: dict[BlockKind, set[int]] = readings[0].sizes()
    for reading in readings[1:]:
        here = reading.sizes()
        sizes = {kind: found & here[kind] for kind, found in sizes.items() if kind in here}
    return kinds, tuple(Events.of(list(reading.events(kinds, sizes))) for reading in readings)


class _Reading:
    """One trace being read."""

    def __init__(self, trace: Trace, notes: Sequence[Note]) -> None:
        self._trace = trace
        self._patterns = [Pattern.of(birth) for birth in trace.births]
        self._markers = sorted(_markers(trace, notes), key=lambda marker: marker[0])

    def sizes(self) -> dict[BlockKind, set[int]]:
        """The sizes of every kind of block."""
        found: dict[BlockKind, set[int]] = {}
        for block, num_bytes in enumerate(self._trace.num_bytes):
            found.setdefault(self._kind(block), set()).add(num_bytes)
        return found

    def events(self, kinds: Kinds, sizes: Mapping[BlockKind, set[int]]) -> Iterator[_Key]:
        trace, keys, living = self._trace, dict[int, _Key](), dict[_Key, list[int]]()
        markers = iter([*self._markers, (trace.num_instants + 1, "", None, ())])
        marker = next(markers)
        for instant, block, is_birth in [*trace.events(None), (trace.num_instants, -1, True)]:
            while marker[0] <= instant:
                yield kinds.number(marker[1], marker[2]), marker[3]
                marker = next(markers)
            if block < 0:
                return
            if is_birth:
                key = keys[block] = self._key(block, kinds, sizes)
                living.setdefault(key, []).append(block)
                yield key
            else:
                key = keys.pop(block)
                rank = living[key].index(block)
                del living[key][rank]
                yield kinds.number(_DEATH, kinds.known[key[0]][1]), (*key[1], rank)

    def _key(self, block: int, kinds: Kinds, sizes: Mapping[BlockKind, set[int]]) -> _Key:
        kind, num_bytes = self._kind(block), self._trace.num_bytes[block]
        if num_bytes in sizes.get(kind, ()):
            kind = BlockKind(kind.pattern, kind.category, kind.place, kind.stream, num_bytes)
        numbers = self._patterns[self._trace.birth[block]][1]
        return kinds.number(_BIRTH, kind), (*numbers, num_bytes)

    def _kind(self, block: int) -> BlockKind:
        trace = self._trace
        pattern = self._patterns[trace.birth[block]][0]
        return BlockKind(pattern, trace.category[block], trace.place[block], trace.stream[block], None)


def _markers(trace: Trace, notes: Sequence[Note]) -> Iterator[tuple[int, str, Hashable, tuple[int, ...]]]:
    """What stands between instants: (instant before which, what, of, numbers)."""
    for span in trace.phases:
        name, numbers = _without_numbers(span.name)
        yield span.start, _START, name, numbers
        yield span.end, _END, name, numbers
    for instant in trace.cache_emptied_at:
        yield instant, _EMPTIED, None, ()
    for note in notes:
        yield note.instant, _NOTE, note.name, (note.value,)


def write_trace(events: Events, kinds: Kinds) -> Trace:
    """The trace of which these are the events."""
    return _Writing(kinds).write(events)


class _Writing:
    """A trace being written."""

    def __init__(self, kinds: Kinds) -> None:
        self._kinds = kinds
        self._trace = Trace()
        self._births: dict[Birth, int] = {}
        self._numbers: dict[tuple[Pattern, tuple[int, ...]], int] = {}
        self._living: dict[tuple[Hashable, tuple[int, ...]], list[int]] = {}
        self._phase_start = 0

    def write(self, events: Events) -> Trace:
        values, known = events.values.tolist(), self._kinds.known
        start = 0
        for kind, end in zip(events.kinds.tolist(), events.offsets[1:].tolist(), strict=True):
            what, of = known[kind]
            self._write(what, of, tuple(values[start:end]))
            start = end
        return self._trace

    def _write(self, what: str, of: Hashable, numbers: tuple[int, ...]) -> None:
        trace = self._trace
        if what == _BIRTH:
            assert isinstance(of, BlockKind)
            birth = self._birth(of.pattern, numbers[:-1])
            block = trace.bear(numbers[-1], birth, PLACES[of.place], of.stream, CATEGORIES[of.category])
            self._living.setdefault((of, numbers), []).append(block)
        elif what == _DEATH:
            trace.bury(self._living[of, numbers[:-1]].pop(numbers[-1]))
        elif what == _START:
            self._phase_start = trace.num_instants
        elif what == _END:
            name = _with_numbers(str(of), iter(numbers))
            trace.phases.append(PhaseSpan(name, self._phase_start, trace.num_instants))
        elif what == _EMPTIED:
            trace.cache_emptied_at.append(trace.num_instants)

    def _birth(self, pattern: Pattern, numbers: tuple[int, ...]) -> int:
        found = self._numbers.get((pattern, numbers))
        if found is None:
            found = self._numbers[pattern, numbers] = len(self._trace.births)
            self._trace.births.append(pattern.filled(numbers))
        return found


def _without_numbers(name: str) -> tuple[str, tuple[int, ...]]:
    return _DIGITS.sub("#", name), tuple(int(digits) for digits in _DIGITS.findall(name))


def _with_numbers(name: str, numbers: Iterator[int]) -> str:
    return re.sub("#", lambda _: str(next(numbers)), name)
