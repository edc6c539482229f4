"""The process that measures: ``python -m vramplan.measure.worker``, a fork server of jobs.

A request has ``job`` (a record's spec) and ``trace``; the child writes its record to ``out`` after every phase.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

# What every job needs is imported before the first fork; none of it touches a device or starts a thread.
import deepspeed
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401 - imported by every engine with ZeRO, and slowly
import peft  # noqa: F401
import transformers  # noqa: F401

from vramplan.forkserver import serve
from vramplan.measure.job import measure_job
from vramplan.measure.record import JobSpec
from vramplan.rank.baton import outlive_killed_compilers


def handle(request: dict[str, Any]) -> None:
    """Runs one job in this process."""
    measure_job(JobSpec.model_validate(request["job"]), Path(request["out"]), trace=request["trace"])


if __name__ == "__main__":
    outlive_killed_compilers()
    serve(handle)
