"""Runs of ``vramplan train`` that meet real faults (``faults/sitecustomize.py``)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

from vramplan.measure.run_dir import RunDir, read_events
from vramplan.supervise.attempts import Attempt, read

from support.training import ROOT, command

_HOOKS = Path(__file__).parent / "faults"
_STRICT_MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": "65536",  # a tensor's memory is the system's again when it is freed, so that the
    "MALLOC_TRIM_THRESHOLD_": "0",  # next one needs new memory: a limit is met where it is set, on every machine
    "MALLOC_TOP_PAD_": "0",
}
EVERY_TIME = 0
MIB = 2**20


def fault(rank: int, phase: str, do: str, times: int = 1, **fields: Any) -> dict[str, Any]:
    """One fault, as ``faults/sitecustomize.py`` reads it."""
    return {"rank": rank, "phase": phase, "do": do, "times": times, **fields}


def kill(rank: int, phase: str) -> dict[str, Any]:
    return fault(rank, phase, "signal", number=signal.SIGKILL)


def stop(rank: int, phase: str) -> dict[str, Any]:
    return fault(rank, phase, "signal", number=signal.SIGSTOP)


def environment(faults: list[dict[str, Any]], marks: Path) -> dict[str, str]:
    """Variables under which the ranks meet the faults; what happened already, and what is learnt, lies in ``marks``."""
    counted = [{**each, "marks": str(marks / str(number))} for number, each in enumerate(faults)]
    path = os.pathsep.join([str(_HOOKS), *filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))])
    own = {"VRAMPLAN_TEST_FAULTS": json.dumps(counted), "PYTHONPATH": path, "XDG_STATE_HOME": str(marks / "state")}
    return {**os.environ, **_STRICT_MALLOC, **own}


def train_with(
    faults: list[dict[str, Any]], spec: Path, run_dir: Path, *options: str, timeout_s: float = 600
) -> subprocess.CompletedProcess[str]:
    """``vramplan train`` under faults, to its end."""
    return subprocess.run(
        command(spec, "-o", run_dir, *options),
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
        cwd=ROOT,
        env=environment(faults, run_dir.parent / f"{run_dir.name}-faults"),
    )


def attempts_of(run_dir: Path) -> tuple[Attempt, ...]:
    return read(RunDir(run_dir).attempts)


def samples_of(run_dir: Path) -> dict[int, str]:
    """The digest of each step's samples, of the last time that it was run."""
    events = read_events(RunDir(run_dir).metrics)
    return {event["step"]: event["samples"] for event in events if event["event"] in ("step", "samples")}
