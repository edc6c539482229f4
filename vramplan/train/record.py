"""The run's measurement as a record, the plan's prediction beside it."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from vramplan.facts.environment import TESTED_VERSIONS
from vramplan.measure.record import Measured, PhaseReading, Record, peaks_of
from vramplan.measure.record_spec import record_spec_from_run
from vramplan.measure.run_dir import RunDir
from vramplan.search.plan import Plan
from vramplan.spec.layout import Layout
from vramplan.train.metrics import peak_resident_bytes


def highest_of_ranks(readings: Sequence[PhaseReading]) -> list[PhaseReading]:
    """Phase by phase the reading of the rank with the highest peak; every rank calls."""
    of_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, list(readings))
    return [max(phase, key=lambda reading: reading.allocated_peak_bytes) for phase in zip(*of_ranks, strict=True)]


def write_record(
    plan: Plan,
    run_dir: RunDir,
    config: dict[str, Any],
    readings: Sequence[PhaseReading],
    parameters: tuple[int, int],
    seconds_per_step: float,
) -> None:
    """Writes ``record.jsonl``: one line in the record form, with what the plan predicted under ``predicted``."""
    run, phases = plan.run, tuple(readings)
    layout = run.layout or Layout(dp=plan.node.world_size)
    measured = Measured(
        outcome="ok",
        phases=phases,
        numel_total=parameters[0],
        numel_trainable=parameters[1],
        host_rss_peak_bytes=peak_resident_bytes(),
        seconds_per_step=seconds_per_step,
    )
    measured = replace(measured, **peaks_of(phases))  # type: ignore[arg-type]
    spec = record_spec_from_run(run, config, layout, run_id=run_dir.root.name)
    record = Record(run_dir.root.name, spec, measured, _environment(plan))
    line = record.to_dict() | {"predicted": plan.to_dict()["prediction"]}
    run_dir.record.write_text(json.dumps(line) + "\n", encoding="utf-8")


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
