"""A run's instants, walked once for every batch: what the estimate and the sweep over many layouts evaluate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import overload

from vramplan.memory.between import Passed, Standing
from vramplan.memory.bf16_optimizer import Bf16Optimizer
from vramplan.memory.engine import Engine
from vramplan.memory.job import Job
from vramplan.memory.moments import Stretch
from vramplan.memory.muon_offload import Muon12Offloaded
from vramplan.memory.muon_zero3 import Muon3
from vramplan.memory.muon_zero12 import Muon12
from vramplan.memory.nvme import Zero3Nvme, on_disk
from vramplan.memory.plain_torch import PlainTorch
from vramplan.memory.size import Size, evaluate, undominated
from vramplan.memory.term import Moment
from vramplan.memory.wide_sums import WideSums
from vramplan.memory.zero0 import Zero0
from vramplan.memory.zero3 import Zero3
from vramplan.memory.zero12 import Zero12
from vramplan.memory.zero12_holding import Zero12Holding


@dataclass(frozen=True, slots=True)
class Walked:
    """The phases of one rank, and the sizes that can be its peak for some batch."""

    stretches: tuple[Stretch, ...]
    peaks: tuple[Size, ...]
    standing: Standing

    def peak_bytes(self, basis: Size) -> int:
        return max(evaluate(size, basis) for size in self.peaks)


@lru_cache(maxsize=4096)
def walk(job: Job, rank: int, steps_skipped: bool) -> Walked:
    """The instants of a job without a batch (``Job.shapeless``)."""
    engine = _engine(job, rank, steps_skipped)
    stretches = tuple(engine.walk())
    peaks = undominated(each.size for stretch in stretches for each in stretch.instants)
    return Walked(stretches, peaks, engine.standing())


def _engine(job: Job, rank: int, steps_skipped: bool) -> Engine:
    if job.engine == "torch":
        return PlainTorch(job, rank)
    if job.stage == 0:
        return Zero0(job, rank)
    if job.optimizer == "muon" and job.stage < 3 and job.offload_optimizer:
        return Muon12Offloaded(job, rank)
    if job.optimizer == "muon":
        return Muon12(job, rank) if job.stage < 3 else Muon3(job, rank, steps_skipped)
    if job.stage == 1 and job.sums_in_fp32:
        return Bf16Optimizer(job, rank)
    if job.stage == 2 and job.sums_in_fp32:
        return WideSums(job, rank)
    if job.stage in (1, 2):
        holds = not job.zero.contiguous_gradients and not job.offload_optimizer
        return (Zero12Holding if holds else Zero12)(job, rank)
    return (Zero3Nvme if on_disk(job) else Zero3)(job, rank, steps_skipped)


class Moments(Sequence[Moment]):
    """The highest moment of each phase; its terms are put together when it is asked for."""

    def __init__(self, passed: tuple[Passed, ...]) -> None:
        self._passed = passed

    def __len__(self) -> int:
        return len(self._passed)

    @overload
    def __getitem__(self, index: int) -> Moment: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Moment, ...]: ...
    def __getitem__(self, index: int | slice) -> Moment | tuple[Moment, ...]:
        if isinstance(index, slice):
            return tuple(stretch.moment(basis) for stretch, basis in self._passed[index])
        stretch, basis = self._passed[index]
        return stretch.moment(basis)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and tuple(self) == tuple(other)

    def __hash__(self) -> int:
        return hash(tuple(basis for _, basis in self._passed))

    def __repr__(self) -> str:
        return repr(tuple(self))
