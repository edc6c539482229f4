"""Checkpoints: written beside, checked, published by one rename; the newest whole one is found again.

DeepSpeed writes each rank's shards; beside them lies our own state: the step, which is the whole data cursor, and what
must not have changed for the run to go on as if nothing had happened. How the state was cut may have changed: then it
goes through the neutral form.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from vramplan.errors import CheckpointError, NoWholeCheckpointError
from vramplan.measure.run_dir import write_json
from vramplan.train.disk import why_not_written, write_back
from vramplan.train.engine import TrainEngine
from vramplan.train.manifest import find_damage, find_missing_bytes, write_manifest
from vramplan.train.neutral import load_neutral, write_neutral
from vramplan.train.shards import ShardedState, write_holdings
from vramplan.train.state import STATE, RunState, StateLayout, check_same_run

_TAG = "deepspeed"
_PREFIX = "step-"
_PARTIAL = ".partial-"
_NEUTRAL = ".neutral"


@dataclass(frozen=True, slots=True)
class Resumed:
    """Where a run goes on: what its checkpoint says, and what is to be told of how it was found and read."""

    state: RunState
    path: Path
    notes: tuple[str, ...]

    @property
    def step(self) -> int:
        return self.state.step


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
        if engine.rank == 0:
            _publish(partial, target)
    except (OSError, RuntimeError) as error:
        reason = why_not_written(error, directory)
        shutil.rmtree(partial, ignore_errors=True)  # its room is needed to say what happened
        if reason is None:
            raise
        raise CheckpointError(
            f"checkpoint of step {state.step} cannot be written to {directory} ({reason}); earlier checkpoints are "
            "whole, and --resume goes on from them"
        ) from error
    if engine.rank == 0:
        _prune(directory, target, keep, keep_step)
    dist.barrier()
    return target


def resume(engine: TrainEngine, directory: Path, expected: RunState, snapshots: Path | None = None) -> Resumed | None:
    """Loads the newest whole checkpoint, or snapshot if that is newer, into a fresh engine; None where there is none.

    One that was made by a plan with another ZeRO stage, offload or number of ranks is converted. Steps and the pinned
    loss of ``expected`` are not compared.

    Raises:
        CheckpointError: the checkpoint belongs to another run.
        NoWholeCheckpointError: there are some, and none is whole.
    """
    passed_over: list[str] = []
    for path in _newest_first(directory, snapshots):
        damage = find_damage(path)
        if damage is not None:
            passed_over.append(f"{_kind(path, directory)} {path.name} is damaged ({damage}) and was passed over")
            continue
        state = RunState.read(path)
        check_same_run(state, expected, path)
        return Resumed(state, path, (*passed_over, *load(engine, path, state, directory)))
    if passed_over:
        raise NoWholeCheckpointError(f"no whole checkpoint in {directory}: " + "; ".join(passed_over))
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
    load(engine, path, RunState.read(path), directory)
    return path


def load(engine: TrainEngine, path: Path, state: RunState, directory: Path) -> tuple[str, ...]:
    """Loads a whole checkpoint, in the layout of the engine; what there is to tell of it.

    ``directory``: on the disk, where one that is of another layout is converted.
    """
    wanted = StateLayout.of(engine.run, engine.world_size)
    if state.layout == wanted:
        _load_as_it_is(engine, path)
        return ()
    if not engine.run.optimizer.state_can_be_cut_anew:
        raise CheckpointError(
            f"{path} was made with {state.layout}, this plan has {wanted}: the state of optimizer "
            f"{engine.run.optimizer.kind} cannot be converted, so resume with the plan that made it"
        )
    neutral = directory / f"{_NEUTRAL}-{path.name}"
    try:
        write_neutral(ShardedState(path, _TAG), neutral)
        load_neutral(engine, neutral)
        dist.barrier()
    finally:
        if engine.rank == 0:
            shutil.rmtree(neutral, ignore_errors=True)
    return (f"{_kind(path, directory)} {path.name} of {state.layout} was converted to {wanted}",)


def _name(step: int) -> str:
    return f"{_PREFIX}{step:08d}"


def published(directory: Path) -> list[Path]:
    """Checkpoints by name, newest first."""
    return sorted(directory.glob(f"{_PREFIX}*"), reverse=True)


def _newest_first(directory: Path, snapshots: Path | None) -> list[Path]:
    """Of two that are equally new the checkpoint, which is kept for longer."""
    found = [*published(directory), *(published(snapshots) if snapshots is not None else [])]
    return sorted(found, key=lambda path: path.name, reverse=True)


def _kind(path: Path, directory: Path) -> str:
    return "checkpoint" if path.parent == directory else "snapshot"


def _write(engine: TrainEngine, partial: Path, state: RunState) -> None:
    # frozen weights are in the model that the run started from: with adapters they would be most of every checkpoint
    with _without_frozen_twins(engine.module):
        engine.deepspeed.save_checkpoint(
            str(partial), tag=_TAG, save_latest=False, exclude_frozen_parameters=_has_frozen(engine)
        )
    write_holdings(engine, partial)
    if engine.rank == 0:
        write_json(partial / STATE, asdict(state))
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
        if path.is_file():
            write_back(descriptor)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _prune(directory: Path, written: Path, keep: int, keep_step: int | None = None) -> None:
    """By one rank alone, so it looks at sizes only: contents are read by all ranks together, at a resume.

    One that is newer than the one just ``written`` was passed over at a resume, so it is damaged and kept for nothing.
    """
    reached = [path for path in published(directory) if path.name <= written.name]
    complete = [path for path in reached if find_missing_bytes(path) is None]
    kept = {path.name for path in complete[:keep]} | ({_name(keep_step)} if keep_step is not None else set())
    stale = [path for path in published(directory) if path.name not in kept]
    for path in (*stale, *directory.glob(f"{_PARTIAL}*"), *directory.glob(f"{_NEUTRAL}*")):
        shutil.rmtree(path, ignore_errors=True)


def _load_as_it_is(engine: TrainEngine, path: Path) -> None:
    loaded, _ = engine.deepspeed.load_checkpoint(
        str(path), tag=_TAG, load_module_strict=not _has_frozen(engine), load_lr_scheduler_states=False
    )
    if loaded is None:
        raise CheckpointError(f"{path}: DeepSpeed finds no checkpoint in it")


def _has_frozen(engine: TrainEngine) -> bool:
    return any(not param.requires_grad for param in engine.module.parameters())
