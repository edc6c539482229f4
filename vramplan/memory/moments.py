"""Instants of a run as headings and bytes, and the phases that they belong to."""

from __future__ import annotations

from dataclasses import dataclass, field

from vramplan.memory.labels import HOST, term
from vramplan.memory.ledger import PhaseBytes
from vramplan.memory.size import Size, evaluate
from vramplan.memory.tape import Point
from vramplan.memory.term import Moment, Phase

Bytes = dict[str, int]


def total(parts: Bytes) -> int:
    """All bytes of a state."""
    return sum(parts.values())


def merged(*many: Bytes) -> Bytes:
    """Headings and bytes of several states that are alive together."""
    result: Bytes = {}
    for parts in many:
        for name, num_bytes in parts.items():
            result[name] = result.get(name, 0) + num_bytes
    return result


def at_point(point: Point, basis: Size) -> Bytes:
    """What is alive at a point of the tape for a given batch."""
    return {label: evaluate(size, basis) for label, size in point.by_label.items()}


def without_gradient(alive: Bytes, num_bytes: int) -> Bytes:
    """What is left when the gradient in hand has been moved into the bucket."""
    name = "gradient of the weight in hand"
    held = min(alive.get(name, 0), num_bytes)
    rest = {**alive, name: alive.get(name, 0) - held}
    if held < num_bytes:  # a tied weight's gradients were summed under another heading
        other = "activation gradients"
        rest[other] = max(0, rest.get(other, 0) - (num_bytes - held))
    return rest


@dataclass
class Stretch:
    """One phase of a record while it is being filled: its highest instant so far, and what is alive at its end."""

    record_phase: str
    phase: Phase
    first_step: bool
    best: tuple[str, Bytes] = ("", {})
    best_bytes: int = -1
    end: Bytes = field(default_factory=dict)
    host_apart: bool = False
    """Whether the host's memory is not the device's (on the CPU it is)."""
    host: Bytes = field(default_factory=dict)
    """The host's bytes at their highest."""
    held: Bytes = field(default_factory=dict)
    """What is alive throughout the phase and after it, besides what each instant says."""
    passing: Bytes = field(default_factory=dict)
    """What is alive throughout the phase, but not at its end."""

    def _on_device(self, parts: Bytes) -> Bytes:
        """The device's part of a state; the host's is noted."""
        on_host = {name: size for name, size in parts.items() if name.startswith(HOST)}
        if not self.host_apart or not on_host:
            return dict(parts)  # the engine goes on changing its own
        if total(on_host) > total(self.host):
            self.host = on_host
        return {name: size for name, size in parts.items() if name not in on_host}

    def see(self, name: str, parts: Bytes) -> None:
        """An instant at which ``parts`` are alive."""
        self._see(name, merged(parts, self.held, self.passing))

    def _see(self, name: str, parts: Bytes) -> None:
        parts = self._on_device(parts)
        num_bytes = total(parts)
        if num_bytes > self.best_bytes:
            self.best, self.best_bytes = (name, parts), num_bytes

    def close(self, end: Bytes) -> None:
        end = merged(end, self.held)
        self.end = self._on_device(end)
        self._see("end", end)

    def moment(self) -> Moment:
        name, parts = self.best
        terms = tuple(
            sorted((term(key, value) for key, value in parts.items() if value), key=lambda each: -each.num_bytes)
        )
        return Moment(f"{self.record_phase}: {name}", self.phase, terms, self.first_step)

    def phase_bytes(self) -> PhaseBytes:
        return PhaseBytes(self.record_phase, self.best_bytes, total(self.end))
