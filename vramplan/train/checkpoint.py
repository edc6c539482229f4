"""Checkpoints: written beside, checked, published by one rename; the newest whole one is found again.

DeepSpeed writes each rank's shards; beside them lies our own state: the step, which is the whole data cursor, and what
must not have changed for the run to go on as if nothing had happened.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from vramplan.errors import CheckpointError
from vramplan.measure.run_dir import write_json
from vramplan.spec.run import RunSpec
from vramplan.train.engine import TrainEngine
from vramplan.train.manifest import find_damage, find_missing_bytes, write_manifest

_TAG = "deepspeed"
_STATE = "state.json"
_PREFIX = "step-"
_PARTIAL = ".partial-"


@dataclass(frozen=True, slots=True)
class RunState:
    """What a checkpoint says of its run: the optimizer steps done, and what decides data and layout."""

    step: int
    total_steps: int
    seed: int
    num_samples: int
    global_batch_size: int
    world_size: int
    zero_stage: int
    method: str
    model: str

    @classmethod
    def of(cls, run: RunSpec, *, step: int, total_steps: int, num_samples: int, world_size: int) -> RunState:
        return cls(
            step=step,
            total_steps=total_steps,
            seed=run.training.seed,
            num_samples=num_samples,
            global_batch_size=run.global_batch_size or 0,
            world_size=world_size,
            zero_stage=run.zero.stage or 0,
            method=run.method.kind,
            model=run.model,
        )


@dataclass(frozen=True, slots=True)
class Resumed:
    """Where a run goes on: the step of the checkpoint, and what was said of newer ones that were passed over."""

    step: int
    path: Path
    passed_over: tuple[str, ...]


def save_checkpoint(
    engine: TrainEngine, directory: Path, state: RunState, keep: int, keep_step: int | None = None
) -> Path:
    """Writes a checkpoint of all ranks and publishes it; then drops all but the newest ``keep`` and that of
    ``keep_step``.

    A crash at any moment leaves the earlier ones whole: only a finished directory gets its name.

    Raises:
        CheckpointError: it cannot be written (a full disk); the earlier ones stay.
    """
    target = directory / _name(state.step)
    partial = directory / f"{_PARTIAL}{target.name}"
    if engine.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    try:
        _write(engine, partial, state)
    except OSError as error:
        raise CheckpointError(
            f"checkpoint of step {state.step} cannot be written to {directory} ({error.strerror or error}); "
            "earlier checkpoints are whole"
        ) from error
    if engine.rank == 0:
        _publish(partial, target)
        _prune(directory, keep, keep_step)
    dist.barrier()
    return target


def resume(engine: TrainEngine, directory: Path, expected: RunState) -> Resumed | None:
    """Loads the newest whole checkpoint into a fresh engine; None where there is none.

    ``expected.step`` is not compared.

    Raises:
        CheckpointError: the checkpoint belongs to another run or layout, or none of several is whole.
    """
    passed_over: list[str] = []
    for path in published(directory):
        damage = find_damage(path)
        if damage is not None:
            passed_over.append(f"checkpoint {path.name} is damaged ({damage}) and was passed over")
            continue
        state = RunState(**json.loads((path / _STATE).read_text(encoding="utf-8")))
        _check_same_run(state, expected, path)
        _load(engine, path)
        return Resumed(state.step, path, tuple(passed_over))
    if passed_over:
        raise CheckpointError(f"no whole checkpoint in {directory}: " + "; ".join(passed_over))
    return None


def load_step(engine: TrainEngine, directory: Path, step: int) -> Path:
    """Loads the checkpoint of one step; gives its directory.

    Raises:
        CheckpointError: it is not there or not whole.
    """
    path = directory / _name(step)
    damage = find_damage(path) if path.is_dir() else "there is no such directory"
    if damage is not None:
        raise CheckpointError(f"{path}: {damage}")
    _load(engine, path)
    return path


def _name(step: int) -> str:
    return f"{_PREFIX}{step:08d}"


def published(directory: Path) -> list[Path]:
    """Checkpoints by name, newest first."""
    return sorted(directory.glob(f"{_PREFIX}*"), reverse=True)


def _write(engine: TrainEngine, partial: Path, state: RunState) -> None:
    # frozen weights are in the model that the run started from: with adapters they would be most of every checkpoint
    with _without_frozen_twins(engine.module):
        engine.deepspeed.save_checkpoint(
            str(partial), tag=_TAG, save_latest=False, exclude_frozen_parameters=_has_frozen(engine)
        )
    if engine.rank == 0:
        write_json(partial / _STATE, asdict(state))
    dist.barrier()
    write_manifest(partial)


@contextmanager
def _without_frozen_twins(module: Any) -> Iterator[None]:
    """Inside, ``state_dict`` leaves out frozen weights under every name that they have.

    DeepSpeed excludes each by the first of its names only (``engine.module_state_dict``), so that a head tied to the
    embedding would be saved whole.
    """
    frozen = [name for name, param in module.named_parameters(remove_duplicate=False) if not param.requires_grad]

    def drop(_module: Any, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
        for name in frozen:
            state.pop(prefix + name, None)

    hook = module.register_state_dict_post_hook(drop)
    try:
        yield
    finally:
        hook.remove()


def _publish(partial: Path, target: Path) -> None:
    for path in (*partial.rglob("*"), partial):
        _sync(path)
    shutil.rmtree(target, ignore_errors=True)  # the same step, written again after a resume from an earlier one
    partial.rename(target)
    _sync(target.parent)


def _sync(path: Path) -> None:
    """Puts a file's content, or a directory's names, on the disk before the name that promises them."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _prune(directory: Path, keep: int, keep_step: int | None = None) -> None:
    """By one rank alone, so it looks at sizes only: contents are read by all ranks together, at a resume."""
    complete = [path for path in published(directory) if find_missing_bytes(path) is None]
    kept = {path.name for path in complete[:keep]} | ({_name(keep_step)} if keep_step is not None else set())
    stale = [path for path in published(directory) if path.name not in kept]
    for path in (*stale, *directory.glob(f"{_PARTIAL}*")):
        shutil.rmtree(path, ignore_errors=True)


def _load(engine: TrainEngine, path: Path) -> None:
    loaded, _ = engine.deepspeed.load_checkpoint(
        str(path), tag=_TAG, load_module_strict=not _has_frozen(engine), load_lr_scheduler_states=False
    )
    if loaded is None:
        raise CheckpointError(f"{path}: DeepSpeed finds no checkpoint in it")


def _has_frozen(engine: TrainEngine) -> bool:
    return any(not param.requires_grad for param in engine.module.parameters())


def _check_same_run(state: RunState, expected: RunState, path: Path) -> None:
    for name, saved, now in _differences(state, expected):
        raise CheckpointError(
            f"{path} was made with {name} {saved}, this run has {now}: resume with the plan that made it, "
            "or start in another run directory"
        )


def _differences(state: RunState, expected: RunState) -> Iterator[tuple[str, Any, Any]]:
    saved, now = asdict(state), asdict(expected)
    for name in saved.keys() - {"step", "total_steps"}:
        if saved[name] != now[name]:
            yield name, saved[name], now[name]
