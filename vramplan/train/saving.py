"""When a run's state is written down, and where: checkpoints on the disk, snapshots in shared memory."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from vramplan.facts.host import read_host
from vramplan.measure.run_dir import RunDir
from vramplan.measure.snapshots import claim, snapshots_of
from vramplan.train.checkpoint import save_checkpoint
from vramplan.train.engine import TrainEngine
from vramplan.train.fragments import holdings, moments_of
from vramplan.train.interval import ASSUMED_BYTES_PER_S, save_every
from vramplan.train.metrics import Metrics
from vramplan.train.state import RunState
from vramplan.units import format_bytes

_SETTLED_STEPS = 3
"""Steps of a launch after which a step's time is taken for what steps take."""
_HOUR_S = 3600.0


class Saving:
    """Of one loop. Every rank makes the same calls and comes to the same decisions."""

    def __init__(self, engine: TrainEngine, run_dir: RunDir, metrics: Metrics) -> None:
        self._engine, self._run_dir, self._metrics = engine, run_dir, metrics
        self._training = engine.run.training
        self._snapshots: Path | None = None
        self._steps, self._next, self._save_s = 0, 0, 0.0

    def start(self, resuming: bool) -> None:
        """Prepares snapshots where they are asked for; a run that begins leaves no earlier one's there."""
        if self._engine.rank == 0 and not resuming:
            shutil.rmtree(snapshots_of(self._run_dir), ignore_errors=True)
        self._engine.wait_for_all()
        if self._training.snapshot_every is not None and self._has_room():
            self._snapshots = claim(self._run_dir)

    def checkpoint_is_due(self, steps_done: int, step_s: float) -> bool:
        """As ``training.save_every`` says; else by the time that steps and saving take."""
        if self._training.save_every is not None:
            return steps_done % self._training.save_every == 0
        self._steps += 1
        if self._steps == _SETTLED_STEPS:
            self._save_s = self._save_s or self._state_bytes() / ASSUMED_BYTES_PER_S
            self._plan_next(steps_done, step_s)
        return self._steps >= _SETTLED_STEPS and steps_done >= self._next

    def snapshot_is_due(self, steps_done: int) -> bool:
        """Whether one is to be written after so many steps."""
        every = self._training.snapshot_every
        return self._snapshots is not None and every is not None and steps_done % every == 0

    def checkpoint(self, state: RunState, step_s: float, keep_step: int | None) -> None:
        """Writes one to the disk."""
        directory, keep = self._run_dir.checkpoints, self._training.keep_checkpoints
        path, self._save_s = _timed(lambda: save_checkpoint(self._engine, directory, state, keep, keep_step))
        self._metrics.event("checkpoint", step=state.step, path=str(path), seconds=self._save_s)
        if self._training.save_every is None:
            self._plan_next(state.step, step_s)

    def snapshot(self, state: RunState) -> None:
        """Writes one to shared memory, in the place of the last."""
        directory = self._snapshots
        if directory is None:
            return
        path, seconds = _timed(lambda: save_checkpoint(self._engine, directory, state, keep=1))
        self._metrics.event("snapshot", step=state.step, path=str(path), seconds=seconds)

    def _plan_next(self, steps_done: int, step_s: float) -> None:
        failure_s = self._training.hours_between_failures * _HOUR_S
        self._next = steps_done + int(self._of_rank_0(save_every(step_s, self._save_s, failure_s)))

    def _has_room(self) -> bool:
        needed, free = 2 * self._state_bytes(), read_host().shm_free_bytes or 0
        if self._of_rank_0(needed <= free):
            return True
        self._metrics.event(
            "note",
            text=f"no snapshots are written: two take {format_bytes(needed)}, /dev/shm has {format_bytes(free)} left",
        )
        return False

    def _state_bytes(self) -> int:
        """Of the whole run's state as a checkpoint holds it, about: fp32 masters and moments, and the weights."""
        held, module = holdings(self._engine), self._engine.module
        moments = moments_of(self._engine.run.optimizer)
        slots = 1 + (2 if moments is None else len(moments))
        own = slots * sum(master.numel() * master.element_size() for master in held.masters)
        weights: int = sum(param.numel() * param.element_size() for param in module.parameters() if param.requires_grad)
        splits = bool(self._engine.run.zero.stage)
        total = torch.tensor(own if splits or self._engine.rank == 0 else 0, dtype=torch.float64)
        return int(self._engine.sum_over_ranks(total.to(self._engine.device))[0] + weights)

    def _of_rank_0(self, number: float) -> float:
        shared = torch.tensor([float(number)], dtype=torch.float64, device=self._engine.device)
        dist.broadcast(shared, 0)
        return float(shared)


def _timed(write: Callable[[], Any]) -> tuple[Any, float]:
    started = time.perf_counter()
    return write(), time.perf_counter() - started
