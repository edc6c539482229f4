"""What rank 0 writes down while it trains: events as JSON lines, scalars for trackers, memory readings."""

from __future__ import annotations

import resource
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vramplan.measure.record import PhaseReading
from vramplan.measure.run_dir import RunDir, append_event
from vramplan.spec.run import RunSpec
from vramplan.train.trackers import finish_trackers, start_trackers

_KIB = 1024


class Metrics:
    """Rank 0 writes; on other ranks every call does nothing."""

    def __init__(self, run: RunSpec, run_dir: RunDir, rank: int, device: torch.device) -> None:
        self._path, self._writes = run_dir.metrics, rank == 0
        self._trackers = start_trackers(run, run_dir, device.type) if rank == 0 else []

    def event(self, kind: str, /, **fields: Any) -> None:
        if self._writes:
            append_event(self._path, kind, **fields)

    def scalars(self, step: int, **values: float | None) -> None:
        """Points of the trackers' curves; ``train__loss`` is shown as ``train/loss``.

        A tracker that fails (its server is gone) is let go, with a note: it must not end the run.
        """
        shown = {name.replace("__", "/"): value for name, value in values.items() if value is not None}
        for tracker in tuple(self._trackers):
            try:
                tracker.log(shown, step=step)
            except Exception as error:  # noqa: BLE001  # each service raises its own
                self._trackers.remove(tracker)
                self.event("note", text=f"{tracker.name} takes no more points from step {step} on: {error}")

    def close(self) -> None:
        finish_trackers(self._trackers)


@dataclass(slots=True)
class Memory:
    """This rank's memory as the progress line shows it, in bytes.

    On CUDA ``now`` and ``peak`` are what tensors hold. The CPU's allocator counts only while a probe runs, so there
    ``now`` is the process's resident set, and ``peak`` the highest that the probe saw; the process's own until it has
    seen any, and throughout a resumed run, whose steps are not measured.
    """

    device: torch.device
    peak: int = 0

    def learn(self, readings: list[PhaseReading]) -> None:
        self.peak = max(self.peak, max((reading.allocated_peak_bytes for reading in readings), default=0))

    def fields(self) -> dict[str, int | str]:
        if self.device.type == "cuda":
            self.peak = max(self.peak, torch.cuda.max_memory_allocated(self.device))
            now, of = torch.cuda.memory_allocated(self.device), "tensors"
        else:
            now, of = resident_bytes(), "process"
        peak, peak_of = (self.peak, "tensors") if self.peak else (peak_resident_bytes(), "process")
        return {"memory_now": now, "memory_of": of, "memory_peak": peak, "memory_peak_of": peak_of}


def resident_bytes() -> int:
    """Memory of this process that is in RAM now."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize()


def peak_resident_bytes() -> int:
    """The most that this process ever had in RAM."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _KIB
