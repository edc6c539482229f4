"""Where a run keeps snapshots in shared memory: they outlive its processes, and no disk is waited for. No torch.

A snapshot has the form of a checkpoint. It lies in the host's memory until the run ends, when a snapshot that is newer
than every checkpoint is moved to the disk.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from contextlib import suppress
from pathlib import Path

from vramplan.measure.run_dir import RunDir

SHARED_MEMORY = Path("/dev/shm")
_OWNER = "run-directory"
_PREFIX = "step-"


def snapshots_of(run_dir: RunDir, shared_memory: Path = SHARED_MEMORY) -> Path:
    """The directory of a run's snapshots on this machine; it need not exist."""
    where = hashlib.blake2b(str(run_dir.root.resolve()).encode(), digest_size=8).hexdigest()
    return shared_memory / f"vramplan-{os.getuid()}-{where}"


def claim(run_dir: RunDir, shared_memory: Path = SHARED_MEMORY) -> Path:
    """Makes the directory of a run's snapshots and writes into it whose they are.

    Raises:
        OSError: it cannot be written.
    """
    directory = snapshots_of(run_dir, shared_memory)
    directory.mkdir(mode=0o700, exist_ok=True)
    (directory / _OWNER).write_text(str(run_dir.root.resolve()), encoding="utf-8")
    return directory


def has_saved_state(run_dir: RunDir, shared_memory: Path = SHARED_MEMORY) -> bool:
    """Whether there is anything that a run could go on from."""
    return newest_saved_step(run_dir, shared_memory) is not None


def newest_saved_step(run_dir: RunDir, shared_memory: Path = SHARED_MEMORY) -> int | None:
    """Optimizer steps in the newest of a run's checkpoints and snapshots; None where there is none."""
    places = (run_dir.checkpoints, snapshots_of(run_dir, shared_memory))
    names = (path.name.removeprefix(_PREFIX) for place in places for path in place.glob(f"{_PREFIX}*"))
    return max((int(name) for name in names if name.isdigit()), default=None)


def held_bytes(run_dir: RunDir, shared_memory: Path = SHARED_MEMORY) -> int:
    """Bytes of the host's memory that a run's snapshots take while no process of it lives."""
    files = (path for path in snapshots_of(run_dir, shared_memory).rglob("*") if path.is_file())
    return sum(path.stat().st_size for path in files)


def put_away(run_dir: RunDir, shared_memory: Path = SHARED_MEMORY) -> str | None:
    """Frees the memory of a run's snapshots; the newest becomes a checkpoint if no checkpoint is as new.

    Says so where there is something to say: what was moved, or why it stays (then the memory is not freed).
    """
    directory = snapshots_of(run_dir, shared_memory)
    newest = max(directory.glob(f"{_PREFIX}*"), default=None)
    said = None
    if newest is not None and not any(path.name >= newest.name for path in run_dir.checkpoints.glob(f"{_PREFIX}*")):
        try:
            _move(newest, run_dir.checkpoints / newest.name)
        except OSError as error:
            return f"the snapshot {newest} is newer than every checkpoint but cannot be moved there ({error.strerror})"
        said = f"the snapshot of {newest.name} was moved to {run_dir.checkpoints}"
    shutil.rmtree(directory, ignore_errors=True)
    return said


def remove_forgotten(shared_memory: Path = SHARED_MEMORY) -> None:
    """Removes snapshots of this user's runs whose run directory is gone."""
    for directory in shared_memory.glob(f"vramplan-{os.getuid()}-*"):
        with suppress(OSError):
            if not Path((directory / _OWNER).read_text(encoding="utf-8")).is_dir():
                shutil.rmtree(directory, ignore_errors=True)


def _move(source: Path, target: Path) -> None:
    partial = target.with_name(f".partial-{target.name}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        shutil.copytree(source, partial)
        for path in partial.rglob("*"):
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        partial.rename(target)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
