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


class Phases:
    """Opens phases by the names of the record form (``step1.micro1.forward``).

    Measuring costs time (on the CPU a profiler runs, on CUDA each edge waits for the device), so it ends with
    ``stop_measuring``, after which phases are only marked.
    """

    def __init__(self, status: RankStatus, device: torch.device) -> None:
        self._status = status
        self._probe: PhaseProbe | None = PhaseProbe(device)
        self.readings: list[PhaseReading] = []

    @contextmanager
    def phase(self, name: str, step: int = 0, micro: int = 0) -> Iterator[None]:
        """``name`` in full inside a step: ``step1.micro1.forward``; ``step`` and ``micro`` count from 1."""
        self._status.mark(name, step, micro)
        if self._probe is None:
            yield
            return
        with self._probe.phase(name):
            yield

    def hold(self, batch: Batch, samples: tuple[int, ...]) -> None:
        """Keeps the names of what a micro-batch is made of, for the marker of one that does not fit."""
        self._status.hold((tuple(batch.input_ids.shape), tuple(batch.labels.shape)), samples)

    @property
    def measuring(self) -> bool:
        return self._probe is not None

    def stop_measuring(self) -> None:
        """Keeps what was read and ends the probe."""
        if self._probe is not None:
            self.readings = list(self._probe.readings)
            self._probe.close()
            self._probe = None
