"""Phases of a rank: each is marked in its status, and the first ones are measured."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from vramplan.data.batch import Batch
from vramplan.measure.probe import PhaseProbe
from vramplan.measure.record import PhaseReading
from vramplan.train.status import RankStatus

PROBED_STEPS = 2
"""Optimizer steps whose memory is measured: the first makes the optimizer's states, the second meets them."""


BETWEEN_STEPS = ("evaluation", "save", "export")
"""Phases that are measured where they first come."""


class Phases:
    """Opens phases by the names of the record form (``step1.micro1.forward``).

    Measuring costs time (on the CPU a profiler runs, on CUDA each edge waits for the device), so of steps it ends with
    ``stop_measuring_steps``; after ``stop_measuring`` phases are only marked.
    """

    def __init__(self, status: RankStatus, device: torch.device) -> None:
        self._status = status
        self._probe: PhaseProbe | None = PhaseProbe(device)
        self._kept: list[PhaseReading] = []
        self._num_kept = 0
        self._wanted: set[str] | None = None
        """Phases that are still to be measured; None: all."""
        self._met: set[str] = set()
        """Of those, what was measured since the last step."""
        self.shapes: dict[str, tuple[int, int]] = {}
        """By phase: sequences and their length, of the largest forward of an evaluation that was measured in it."""

    @contextmanager
    def phase(self, name: str, step: int = 0, micro: int = 0) -> Iterator[None]:
        """``name`` in full inside a step: ``step1.micro1.forward``; ``step`` and ``micro`` count from 1."""
        self._status.mark(name, step, micro)
        if self._probe is None or not self._is_wanted(name):
            yield
            return
        with self._probe.phase(name):
            yield

    def _is_wanted(self, name: str) -> bool:
        """Measuring rests in the phases of steps; what was measured between two of them is not measured again."""
        assert self._probe is not None
        if self._wanted is None:
            return True
        if name in self._wanted:
            self._met.add(name)
            return True
        if name not in BETWEEN_STEPS:
            self._probe.pause()
            self._wanted -= self._met
        return False

    def evaluated(self, name: str, shape: tuple[int, int]) -> None:
        """Keeps the shape of an evaluation's largest forward in a phase, if the phase was measured."""
        if self._probe is not None and (self._wanted is None or name in self._met):
            self.shapes[name] = max(self.shapes.get(name, (0, 0)), shape, key=lambda each: each[0] * each[1])

    def hold(self, batch: Batch, samples: tuple[int, ...]) -> None:
        """Keeps the names of what a micro-batch is made of, for the marker of one that does not fit."""
        self._status.hold((tuple(batch.input_ids.shape), tuple(batch.labels.shape)), samples)

    @property
    def measuring(self) -> bool:
        return self._probe is not None

    @property
    def measures_steps(self) -> bool:
        """Whether the phases of steps are measured too."""
        return self._probe is not None and self._wanted is None

    @property
    def readings(self) -> list[PhaseReading]:
        """What was read so far; of phases with one name that with the highest peak."""
        highest: dict[str, PhaseReading] = {}
        for reading in self._kept if self._probe is None else self._probe.readings:
            known = highest.get(reading.phase)
            if known is None or known.allocated_peak_bytes <= reading.allocated_peak_bytes:
                highest.pop(reading.phase, None)
                highest[reading.phase] = reading
        return list(highest.values())

    @property
    def num_read(self) -> int:
        """How often a phase was read so far: as often on every rank, whatever was read."""
        return self._num_kept if self._probe is None else len(self._probe.readings)

    def stop_measuring_steps(self) -> None:
        """From now on only what comes between steps is measured, once."""
        self._wanted = set(BETWEEN_STEPS)

    def stop_measuring(self) -> None:
        """Keeps what was read and ends the probe."""
        if self._probe is not None:
            self._kept, self._num_kept = self.readings, self.num_read
            self._probe.close()
            self._probe = None
