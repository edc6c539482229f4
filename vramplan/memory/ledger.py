"""What an estimate answers: moments, phases, overhead, host bytes, and the verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vramplan.memory.labels import PINNED
from vramplan.memory.term import Moment, Term


@dataclass(frozen=True, slots=True)
class PhaseBytes:
    """Bytes allocated on one rank in one phase, named as in a record (``step2.micro1.backward``)."""

    phase: str
    peak_bytes: int
    end_bytes: int


@dataclass(frozen=True, slots=True)
class Band:
    """A reading that depends on what happened before: between these, both included."""

    low_bytes: int
    high_bytes: int

    def holds(self, num_bytes: int) -> bool:
        """Whether a reading lies in the band."""
        return self.low_bytes <= num_bytes <= self.high_bytes


@dataclass(frozen=True, slots=True)
class Estimate:
    """The ledger of one run on one rank.

    Three readings, never mixed: *allocated* (tensors), *reserved* (held by torch's caching allocator) and *used*
    (what the driver reports: reserved, context, communicators, workspaces).
    """

    moments: Sequence[Moment]
    """The highest instant of each phase, in the order of ``phases``."""
    phases: tuple[PhaseBytes, ...]
    """In order: model_load, engine_init, then forward, backward, optimizer_step of each micro-batch of two steps, then
    evaluation, save, resume and export, where the run passes them."""
    overhead: tuple[Term, ...]
    """What the driver counts beyond tensors: context, communicators, workspaces, fragmentation."""
    host_terms: tuple[Term, ...]
    """Host bytes of one rank."""
    capacity_bytes: int
    ranks_per_node: int
    host_capacity_bytes: int | None = None
    disk_terms: tuple[Term, ...] = ()
    """Bytes of one rank in files (offload to NVMe)."""
    workspace_bytes: int = 0
    """Of the overhead, what libraries allocate through torch: part of what torch counts as allocated."""
    reserved_band: Band | None = None
    """What torch's caching allocator may hold at the peak; None on the CPU."""
    used_band: Band | None = None
    """What the driver may report at the peak; None on the CPU."""

    @property
    def peak(self) -> Moment:
        """The moment with the most bytes of all moments the run passes."""
        peaks = [phase.peak_bytes for phase in self.phases]
        return self.moments[peaks.index(max(peaks))]

    @property
    def allocated_peak_bytes(self) -> int:
        return max(phase.peak_bytes for phase in self.phases)

    @property
    def used_peak_bytes(self) -> int:
        return self.allocated_peak_bytes + sum(term.num_bytes for term in self.overhead)

    @property
    def train_allocated_peak_bytes(self) -> int:
        """The highest peak of the step phases (a record's figure of that name)."""
        return max(phase.peak_bytes for phase in self.phases if phase.phase.startswith("step"))

    def through_steps(self, steps: int) -> tuple[PhaseBytes, ...]:
        """The phases of a run that ends after so many steps; every later step is as the second."""
        later = "step2." if steps == 1 else "no phase"
        return tuple(phase for phase in self.phases if not phase.phase.startswith(later))

    @property
    def between_steps_bytes(self) -> int:
        """What is allocated after the last step."""
        return [phase for phase in self.phases if phase.phase.startswith("step")][-1].end_bytes

    @property
    def host_bytes_per_node(self) -> int:
        return self.ranks_per_node * sum(term.num_bytes for term in self.host_terms)

    @property
    def pinned_bytes_per_node(self) -> int:
        """Of the host's bytes of a node, those in page-locked memory."""
        pinned = sum(term.num_bytes for term in self.host_terms if term.name in PINNED)
        return self.ranks_per_node * pinned

    @property
    def disk_bytes_per_node(self) -> int:
        return self.ranks_per_node * sum(term.num_bytes for term in self.disk_terms)

    @property
    def host_fits(self) -> bool:
        return self.host_capacity_bytes is None or self.host_bytes_per_node <= self.host_capacity_bytes

    @property
    def fits(self) -> bool:
        """Whether *used* stays within the device's capacity and the host's bytes within the host."""
        return self.used_peak_bytes <= self.capacity_bytes and self.host_fits
