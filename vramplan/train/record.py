"""The run's measurement as a record, the plan's prediction beside it."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from vramplan.facts.environment import TESTED_VERSIONS
from vramplan.measure.record import (
    ForwardShape,
    JobSpec,
    Measured,
    PassedMoments,
    PhaseReading,
    Record,
    peaks_of,
    read_records,
)
from vramplan.measure.record_spec import record_spec_from_run
from vramplan.measure.run_dir import RunDir
from vramplan.search.plan import Plan
from vramplan.spec.layout import Layout
from vramplan.train.metrics import peak_resident_bytes
from vramplan.train.phases import Phases


def highest_of_ranks(readings: Sequence[PhaseReading]) -> list[PhaseReading]:
    """Phase by phase the reading of the rank with the highest peak; every rank calls."""
    of_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, list(readings))
    return [
        max(
            (reading for rank in of_ranks for reading in rank if reading.phase == own.phase),
            key=lambda reading: reading.allocated_peak_bytes,
        )
        for own in of_ranks[0]
    ]


class Recorder:
    """Writes ``record.jsonl``: one line in the record form, with what the plan predicted under ``predicted``. Every
    rank makes the same calls; rank 0 writes.

    ``config``: fields of the model's ``config.json``; ``parameters``: all and trained ones.
    """

    def __init__(
        self, plan: Plan, run_dir: RunDir, config: dict[str, Any], phases: Phases, parameters: tuple[int, int]
    ) -> None:
        self._plan, self._run_dir, self._config = plan, run_dir, config
        self._phases, self._parameters = phases, parameters
        self._num_written = 0
        self._seconds_per_step: float | None = None

    def write(self, seconds_per_step: float) -> list[PhaseReading]:
        """The record of what was read so far; gives the readings, of all ranks."""
        self._seconds_per_step = seconds_per_step
        self._num_written = self._phases.num_read
        readings = highest_of_ranks(self._phases.readings)
        passed = passed_moments(readings, _largest_of_ranks(self._phases.shapes))
        if dist.get_rank() == 0:
            self._write_line(readings, passed)
        return readings

    def refresh(self) -> None:
        """The record anew, where phases were read since it was written. By their number, on which ranks agree: what
        they read may be new on one rank and the same on another."""
        if self._seconds_per_step is not None and self._phases.num_read != self._num_written:
            self.write(self._seconds_per_step)

    def add_resume(self) -> None:
        """Adds the reading of a resume to the record of the same plan that is there, if there is one."""
        resumed = [reading for reading in self._phases.readings if reading.phase == "resume"]
        readings, shapes = highest_of_ranks(resumed), _largest_of_ranks(self._phases.shapes)
        if dist.get_rank() or not readings or not self._run_dir.record.is_file():
            return
        (record,) = read_records(self._run_dir.record)
        passes = record.spec.passes or PassedMoments()
        if self._spec(passes).model_dump(mode="json") != record.spec.model_dump(mode="json"):  # of another plan
            return
        self._seconds_per_step = record.measured.seconds_per_step
        pinned = passes.pinned or _forward_shape(shapes.get("resume"))
        others = [reading for reading in record.measured.phases if reading.phase != "resume"]
        self._write_line([*others, *readings], passes.model_copy(update={"resumed": True, "pinned": pinned}))
        self._seconds_per_step = None  # else this rank alone would go on to gather the others' readings in ``refresh``

    def _spec(self, passed: PassedMoments) -> JobSpec:
        run = self._plan.run
        layout = run.layout or Layout(dp=self._plan.node.world_size)
        spec = record_spec_from_run(run, self._config, layout, run_id=self._run_dir.root.name)
        return spec.model_copy(update={"passes": passed})

    def _write_line(self, readings: Sequence[PhaseReading], passed: PassedMoments) -> None:
        phases = tuple(readings)
        measured = Measured(
            outcome="ok",
            phases=phases,
            numel_total=self._parameters[0],
            numel_trainable=self._parameters[1],
            host_rss_peak_bytes=peak_resident_bytes(),
            seconds_per_step=self._seconds_per_step,
        )
        measured = replace(measured, **peaks_of(phases))  # type: ignore[arg-type]
        record = Record(self._run_dir.root.name, self._spec(passed), measured, _environment(self._plan))
        line = record.to_dict() | {"predicted": self._plan.to_dict()["prediction"]}
        self._run_dir.record.write_text(json.dumps(line) + "\n", encoding="utf-8")


def passed_moments(readings: Sequence[PhaseReading], shapes: Mapping[str, tuple[int, int]]) -> PassedMoments:
    """What was measured besides steps, by the phases that were read and the largest forward of each."""
    names = [reading.phase for reading in readings]
    before_save = names[names.index("save") - 1] if "save" in names else ""
    return PassedMoments(
        evaluation=_forward_shape(shapes.get("evaluation")),
        pinned=_forward_shape(shapes.get("save") or shapes.get("resume")),
        resumed=_forward_shape(shapes.get("resume")) is not None,  # where there was a checkpoint
        exported="export" in names,
        saved_after_evaluation=before_save == "evaluation",
    )


def _forward_shape(shape: tuple[int, int] | None) -> ForwardShape | None:
    return None if not shape or not shape[0] else ForwardShape(size=shape[0], length=shape[1])


def _largest_of_ranks(shapes: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    of_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, dict(shapes))
    names = {name for each in of_ranks for name in each}
    return {
        name: max((each[name] for each in of_ranks if name in each), key=lambda shape: shape[0] * shape[1])
        for name in names
    }


def versions() -> dict[str, str]:
    """Of everything installed that decides bytes or numbers."""
    installed = {name: _version(name) for name in TESTED_VERSIONS}
    return {name: version for name, version in installed.items() if version is not None}


def _environment(plan: Plan) -> dict[str, Any]:
    return versions() | {
        "torch": str(torch.__version__),  # with the build, e.g. +cpu
        "device_type": "cpu" if plan.node.device.kind == "cpu" else "cuda",
        "device_name": plan.node.device.name,
        "backend": dist.get_backend(),
        "alloc_conf": plan.run.alloc_conf,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
