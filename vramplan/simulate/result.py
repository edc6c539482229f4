"""What a simulation answers: phases, categories, the largest live tensors, reserved bytes, the first failure.

No torch here. Everything is plain data: it travels between processes and into ``--json`` by ``to_dict``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from vramplan.memory.birth import Birth
from vramplan.memory.ledger import PhaseBytes
from vramplan.memory.term import Category


@dataclass(frozen=True, slots=True)
class SimulatedPhase:
    """Bytes of one phase on one rank."""

    phase: str
    peak_bytes: int
    end_bytes: int
    categories: Mapping[str, int]
    """Bytes by category at the phase's peak."""
    reserved_peak_bytes: int | None = None
    """Highest held by the CUDA caching allocator; None on a CPU, which has none."""
    host_peak_bytes: int = 0
    """Highest of the tensors on the host (offloaded ones) and of what torch holds for pinned ones, where the device is
    a GPU."""
    pinned_bytes: int = 0
    """Of them, what torch holds for pinned ones."""

    @property
    def is_step(self) -> bool:
        return self.phase.startswith("step")

    def as_phase_bytes(self) -> PhaseBytes:
        return PhaseBytes(self.phase, self.peak_bytes, self.end_bytes)


@dataclass(frozen=True, slots=True)
class LiveGroup:
    """Blocks alive at the peak that were born at one place, together."""

    num_bytes: int
    count: int
    largest_bytes: int
    category: str
    birth: Birth

    def to_dict(self) -> dict[str, Any]:
        """As a row of a record's ``live_at_peak``."""
        return {
            "bytes": self.num_bytes,
            "count": self.count,
            "largest_bytes": self.largest_bytes,
            "category": self.category,
            **self.birth.to_dict(),
        }


@dataclass(frozen=True, slots=True)
class Failure:
    """The first allocation that the capacity does not allow."""

    phase: str
    num_bytes: int
    allocated_bytes: int
    reserved_bytes: int
    birth: Birth


@dataclass(frozen=True, slots=True)
class Timeline:
    """Bytes by category over the run, in equal stretches of instants, each at its highest instant."""

    categories: Mapping[str, tuple[int, ...]]
    phases: tuple[tuple[str, int, int], ...]
    """(name, first stretch, stretch after the last)."""
    births: tuple[str, ...] = ()
    """Birthplaces of the blocks in ``largest``, one line each."""
    largest: tuple[tuple[tuple[int, int], ...], ...] = ()
    """For each stretch the largest groups of blocks alive in it: (index in ``births``, bytes)."""


@dataclass(frozen=True, slots=True)
class SimulationResult:
    """The run of one rank, as the simulated device saw it."""

    device_type: str
    phases: tuple[SimulatedPhase, ...]
    largest_live: tuple[LiveGroup, ...]
    """At the highest peak, largest first."""
    timeline: Timeline
    numel_total: int
    numel_trainable: int
    num_blocks: int
    seconds: float
    alloc_retries: int | None = None
    failure: Failure | None = None
    error: str | None = None
    """Why the trace stopped before its end; the phases before are whole."""
    traced_layers: tuple[int, ...] = ()
    """Depths that were traced and from which the full depth follows exactly; empty: all layers were traced."""
    in_full_because: str = ""
    """Why all layers were traced; empty where they were not, or nothing else was asked for."""
    host_rss_peak_bytes: int = 0
    """Of the process that simulated."""
    overhead_bytes: int = 0
    """What the driver counts beside the allocator: context, communicators, libraries."""
    capacity_bytes: int | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def peak(self) -> SimulatedPhase:
        """The phase with the highest peak of all, loading and initialisation included."""
        return max(self.phases, key=lambda phase: phase.peak_bytes)

    @property
    def allocated_peak_bytes(self) -> int:
        return self.peak.peak_bytes

    @property
    def train_allocated_peak_bytes(self) -> int:
        """The highest peak of the step phases (a record's figure of that name)."""
        return max((phase.peak_bytes for phase in self.phases if phase.is_step), default=0)

    @property
    def reserved_peak_bytes(self) -> int | None:
        known = [phase.reserved_peak_bytes for phase in self.phases if phase.reserved_peak_bytes is not None]
        return max(known, default=None)

    @property
    def host_peak_bytes(self) -> int:
        return max((phase.host_peak_bytes for phase in self.phases), default=0)

    @property
    def pinned_bytes(self) -> int:
        """Of ``host_peak_bytes``, what torch holds for pinned tensors."""
        return max(self.phases, key=lambda phase: phase.host_peak_bytes).pinned_bytes if self.phases else 0

    @property
    def used_peak_bytes(self) -> int:
        """What the driver would report at most: reserved (else allocated) bytes and what it counts beside them."""
        reserved = self.reserved_peak_bytes
        return (self.allocated_peak_bytes if reserved is None else reserved) + self.overhead_bytes

    @property
    def fits(self) -> bool | None:
        """None where no capacity was given, or the trace did not reach its end."""
        if self.failure is not None:
            return False
        if self.capacity_bytes is None or self.error is not None:
            return None
        return self.used_peak_bytes <= self.capacity_bytes

    @property
    def categories(self) -> Mapping[str, int]:
        """Bytes by category at the highest peak, largest first."""
        return dict(sorted(self.peak.categories.items(), key=lambda item: -item[1]))

    def to_dict(self) -> dict[str, Any]:
        """Plain values from which ``from_dict`` makes the same result."""
        return asdict(self)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> SimulationResult:
        failure = raw["failure"]
        timeline = raw["timeline"]
        return cls(
            **{
                **raw,
                "phases": tuple(SimulatedPhase(**phase) for phase in raw["phases"]),
                "largest_live": tuple(
                    LiveGroup(**{**group, "birth": Birth(**group["birth"])}) for group in raw["largest_live"]
                ),
                "timeline": Timeline(
                    {name: tuple(values) for name, values in timeline["categories"].items()},
                    tuple((name, first, last) for name, first, last in timeline["phases"]),
                    tuple(timeline["births"]),
                    tuple(tuple((birth, size) for birth, size in row) for row in timeline["largest"]),
                ),
                "traced_layers": tuple(raw["traced_layers"]),
                "failure": Failure(**{**failure, "birth": Birth(**failure["birth"])}) if failure else None,
            }
        )


CATEGORY_ORDER = tuple(category.value for category in Category)
"""Order in which categories are stacked and listed."""
