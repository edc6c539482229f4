"""Curves of a run in TensorBoard, Weights & Biases or MLflow, through accelerate's trackers; rank 0 has them alone."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from vramplan.errors import SpecError
from vramplan.measure.run_dir import RunDir
from vramplan.spec.run import RunSpec

_HINTS = {
    "tensorboard": "install tensorboard",
    "wandb": "run `wandb login`, or set WANDB_MODE=offline",
    "mlflow": "set MLFLOW_TRACKING_URI (a database needs all of mlflow, not mlflow-skinny)",
}


def start_trackers(run: RunSpec, run_dir: RunDir, device_type: str) -> list[Any]:
    """The started trackers that ``training.trackers`` names; a resumed run goes on in their old curves.

    Raises:
        SpecError: one cannot be started, such as W&B without a login.
    """
    if not run.training.trackers:
        return []
    from accelerate import PartialState

    threads = torch.get_num_threads()
    PartialState(cpu=device_type == "cpu")  # what accelerate's loggers ask; the group is joined already
    torch.set_num_threads(threads)  # it takes every core where OMP_NUM_THREADS is not set
    return [_started(name, run, run_dir) for name in run.training.trackers]


def _started(name: str, run: RunSpec, run_dir: RunDir) -> Any:
    try:
        tracker = _made(name, run, run_dir)
        tracker.main_process_only = False  # made on rank 0 alone: there is nobody to ask
        tracker.start()
        if name != "tensorboard":  # its hyperparameters would be a run of their own
            tracker.store_init_configuration(dict(flattened(_asked(run))))
    except Exception as error:  # each service raises its own
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        hint = f"pip install --upgrade {name}" if isinstance(error, ImportError) else _HINTS[name]
        raise SpecError(f"training.trackers: {name} cannot be started ({reason}): {hint}") from error
    if name == "mlflow":
        _mlflow_id(run_dir).write_text(tracker.tracker.info.run_id, encoding="utf-8")
    return tracker


def _made(name: str, run: RunSpec, run_dir: RunDir) -> Any:
    from accelerate import tracking

    title = run_dir.root.resolve().name
    if name == "tensorboard":
        return tracking.TensorBoardTracker(run_dir.tensorboard.name, logging_dir=str(run_dir.root))
    if name == "wandb":
        return tracking.WandBTracker(
            run.training.project, name=title, dir=str(run_dir.root), id=title, resume="allow", reinit=True
        )
    # without an address MLflow would write where the user happens to be
    os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{run_dir.root.resolve()}/mlflow.db")
    known = _mlflow_id(run_dir)
    run_id = known.read_text(encoding="utf-8") if known.exists() else None
    return tracking.MLflowTracker(run.training.project, run_name=title, run_id=run_id)


def _mlflow_id(run_dir: RunDir) -> Path:
    return run_dir.root / "mlflow-run-id"


def _asked(run: RunSpec) -> dict[str, Any]:
    return run.model_dump(mode="json", exclude_defaults=True, exclude={"model_config_fields"})


def flattened(fields: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str | float | bool]]:
    """Dotted keys and plain values of nested mappings; lists become texts."""
    for key, value in fields.items():
        if isinstance(value, Mapping):
            yield from flattened(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, str | int | float | bool) else str(value)


def finish_trackers(trackers: list[Any]) -> None:
    """Closes each; what was trained is saved by then, so one that fails is left."""
    for tracker in trackers:
        with suppress(Exception):
            tracker.finish()
