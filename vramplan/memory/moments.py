"""Instants of a run as headings and bytes, and the phases that they belong to.

Bytes are polynomials of the batch (``memory/size.py``): a run is walked once, and its instants answer every
micro-batch and sequence length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from vramplan.memory.labels import HOST, term
from vramplan.memory.ledger import PhaseBytes
from vramplan.memory.size import ZERO, Size, add, const, dominates, evaluate, of_one_sequence
from vramplan.memory.tape import Point
from vramplan.memory.term import Moment, Phase

Parts = Mapping[str, Size | int]
"""Headings with polynomials, or with plain bytes that do not depend on the batch."""


class Bytes(dict[str, Size]):
    """Headings and polynomials of what is alive together; keeps its sums, since most states are only compared."""

    __slots__ = ("_sums",)

    def __init__(self, parts: Mapping[str, Size] = MappingProxyType({}), sums: tuple[Size, Size] | None = None) -> None:
        super().__init__(parts)
        self._sums = sums

    @property
    def sums(self) -> tuple[Size, Size]:
        """The device's bytes and the host's."""
        if self._sums is None:
            self._sums = _sums(self)
        return self._sums

    def without(self, *names: str) -> Bytes:
        """The rest, when these headings are let go of."""
        return Bytes({name: size for name, size in self.items() if name not in names})


def _sums(parts: Parts) -> tuple[Size, Size]:
    device = host = ZERO
    device_bytes = host_bytes = 0  # plain bytes are added up by themselves: most are
    for name, each in parts.items():
        on_host = name.startswith(HOST)
        if isinstance(each, int):
            host_bytes, device_bytes = host_bytes + each * on_host, device_bytes + each * (not on_host)
        elif on_host:
            host = add(host, each)
        else:
            device = add(device, each)
    return add(device, const(device_bytes)), add(host, const(host_bytes)) if host_bytes else host


def _sum(many: tuple[Parts, ...]) -> tuple[Size, Size]:
    device = host = ZERO
    for parts in many:
        if not parts:
            continue
        some, other = parts.sums if isinstance(parts, Bytes) else _sums(parts)
        device, host = add(device, some), add(host, other) if other is not ZERO else host
    return device, host


def merged(*many: Parts) -> Bytes:
    """Headings and bytes of several states that are alive together."""
    result: dict[str, Size] = {}
    for parts in many:
        for name, each in parts.items():
            size = const(each) if isinstance(each, int) else each
            result[name] = add(result[name], size) if name in result else size
    return Bytes(result, _sum(many))


def at_point(point: Point) -> Bytes:
    """What is alive at a point of the tape."""
    return Bytes(point.by_label, (point.total, ZERO))


@dataclass(slots=True)
class Instant:
    """A state that can be the highest of its phase for some batch."""

    name: str
    size: Size
    many: tuple[Parts, ...]
    place: str
    """``device`` or ``host`` where only that part of the state is meant, else empty."""

    @property
    def parts(self) -> Bytes:
        """What is alive, by heading."""
        every = merged(*self.many)
        if not self.place:
            return every
        return Bytes({name: size for name, size in every.items() if name.startswith(HOST) == (self.place == "host")})


@dataclass
class Stretch:
    """One phase of a record: the instants that can be its highest, and what is alive at its end."""

    record_phase: str
    phase: Phase
    first_step: bool
    host_apart: bool = False
    """Whether the host's memory is not the device's (on the CPU it is)."""
    held: Parts = field(default_factory=Bytes)
    """What is alive throughout the phase and after it, besides what each instant says."""
    instants: list[Instant] = field(default_factory=list)
    host: list[Instant] = field(default_factory=list)
    """The host's states that can be highest, where it is apart."""
    end: Size = ZERO

    def see(self, name: str, *many: Parts) -> None:
        """An instant at which ``many`` are alive together."""
        self._see(name, *many, self.held)

    def _see(self, name: str, *many: Parts) -> None:
        device, host = _sum(many)
        if not self.host_apart:
            _note(self.instants, Instant(name, add(device, host), many, ""))
            return
        _note(self.instants, Instant(name, device, many, "device"))
        if host != ZERO:
            _note(self.host, Instant(name, host, many, "host"))

    def close(self, *end: Parts) -> None:
        self._see("end", *end, self.held)
        device, host = _sum((*end, self.held))
        self.end = device if self.host_apart else add(device, host)

    def highest(self, basis: Size) -> Instant:
        """The instant with the most bytes at a batch; the first of equals."""
        return max(self.instants, key=lambda instant: evaluate(instant.size, basis))

    def moment(self, basis: Size) -> Moment:
        """The highest instant with its terms, largest first."""
        instant = self.highest(basis)
        terms = (term(label, evaluate(size, basis)) for label, size in instant.parts.items())
        ordered = sorted((each for each in terms if each.num_bytes), key=lambda each: -each.num_bytes)
        return Moment(f"{self.record_phase}: {instant.name}", self.phase, tuple(ordered), self.first_step)

    def phase_bytes(self, basis: Size) -> PhaseBytes:
        peak_bytes = max(evaluate(instant.size, basis) for instant in self.instants)
        return PhaseBytes(self.record_phase, peak_bytes, evaluate(self.end, basis))


def joined(name: str, stretches: Sequence[Stretch], held: Parts) -> Stretch:
    """Phases of a micro-batch of one sequence as one, which is still to be closed."""
    last = stretches[-1]
    found = Stretch(name, last.phase, last.first_step, last.host_apart, held)
    for stretch in stretches:
        for into, instants in ((found.instants, stretch.instants), (found.host, stretch.host)):
            for each in instants:
                _note(into, Instant(each.name, of_one_sequence(each.size), tuple(map(_lone, each.many)), each.place))
    return found


def _lone(parts: Parts) -> Bytes:
    """As ``of_one_sequence``, of every heading."""
    return Bytes(
        {name: const(size) if isinstance(size, int) else of_one_sequence(size) for name, size in parts.items()}
    )


def _note(instants: list[Instant], new: Instant) -> None:
    """Keep a state unless another is at least as high for every batch."""
    if any(dominates(other.size, new.size) for other in instants):
        return
    instants[:] = [other for other in instants if not dominates(new.size, other.size)]
    instants.append(new)
