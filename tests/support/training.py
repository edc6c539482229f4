"""Real runs of ``vramplan train`` on two CPU ranks, in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from vramplan.measure.run_dir import RunDir, read_events

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 240


def write_spec(path: Path, model: Path, stage: int, method: str | dict[str, Any] = "full", **fields: Any) -> Path:
    """A spec with everything decided: two ranks, eight sequences a step, six steps, a checkpoint every three."""
    training = {"max_steps": 6, "save_every": 3, "warmup_frac": 0.2, **fields.pop("training", {})}
    spec: dict[str, Any] = {
        "model": str(model),
        "method": {"full": {"kind": "full"}, "lora": {"kind": "lora", "r": 8}}[method]
        if isinstance(method, str)
        else method,
        "precision": "fp32",
        "seq_len": 112,
        "global_batch_size": 8,
        "micro_batch_size": 2,
        "grad_accum_steps": 2,
        "activation_checkpointing": "none",
        "zero": {
            "stage": stage,
            "reduce_bucket_size": 100_000,
            "stage3_param_persistence_threshold": 100,  # so that tiny weights are split too
            "offload_optimizer": "none",
            "offload_param": "none",
        },
        "optimizer": {"kind": "adamw_torch", "lr": 1e-2},
        "hardware": {"gpu": "cpu", "gpus_per_node": 2},
        **fields,
        "training": training,
    }
    path.write_text(yaml.safe_dump(spec), encoding="utf-8")
    return path


def train(*arguments: str | Path, timeout_s: float = TIMEOUT_S) -> subprocess.CompletedProcess[str]:
    """``vramplan train`` to its end, whatever that is."""
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=timeout_s, check=False, cwd=ROOT)


def start(*arguments: str | Path) -> subprocess.Popen[str]:
    """``vramplan train``, running."""
    return subprocess.Popen(
        command(*arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env=os.environ.copy(),
    )


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "vramplan", "train", *map(str, arguments)]


def losses(run_dir: Path) -> dict[int, float]:
    """Loss by optimizer step (of a step that was repeated, the last)."""
    events = read_events(RunDir(run_dir).metrics)
    return {event["step"]: event["loss"] for event in events if event["event"] == "step"}


def events_of(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_events(RunDir(run_dir).metrics) if event["event"] == kind]


def processes_about(text: str) -> list[int]:
    """Ids of living processes (zombies aside) whose command line holds ``text``."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            words = (directory / "cmdline").read_bytes()
        except OSError:
            continue  # it ended while we looked
        if text.encode() in words and int(directory.name) != os.getpid():
            found.append(int(directory.name))
    return found
