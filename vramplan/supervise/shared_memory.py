"""DeepSpeed's reduction buffers in ``/dev/shm``: 66 MiB a rank on the CPU, which nothing unlinks when a run ends.

``shm_initialize`` (deepspeed/ops/csrc/cpu/comm/shm.cpp:340-402) creates
``deepspeed_allreduce_buffer_<uid>_<address>_<port>_<rank>`` and leaves it there; each would stay in host memory until
the machine restarts.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")
_YOUNG_S = 60.0
"""A younger buffer may belong to a run that has created it and not mapped it yet."""


def remove_buffers(port: int, directory: Path = SHARED_MEMORY) -> None:
    """Removes the buffers of an ended run whose ranks met at ``port``."""
    for path in _buffers(directory, f"*_{port}_*"):
        path.unlink(missing_ok=True)


def remove_forgotten_buffers(directory: Path = SHARED_MEMORY) -> int:
    """Removes buffers of this user that no process has mapped: of runs that were killed. Returns their bytes."""
    old = [path for path in _buffers(directory) if time.time() - _modified_s(path) > _YOUNG_S]
    if not old:
        return 0
    mapped, freed = _mapped(directory), 0
    for path in old:
        if str(path) not in mapped:
            with suppress(FileNotFoundError):  # another run of this user removes them too
                size = path.stat().st_size
                path.unlink()
                freed += size
    return freed


def _buffers(directory: Path, pattern: str = "*") -> Iterator[Path]:
    return directory.glob(f"deepspeed_allreduce_buffer_{os.getuid()}_{pattern}")


def _modified_s(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return time.time()


def _mapped(directory: Path) -> set[str]:
    """Files of ``directory`` that some process of ours has mapped."""
    found: set[str] = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            lines = maps.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:  # the process has ended, or is another user's
            continue
        found.update(line[line.index(str(directory)) :] for line in lines if f" {directory}/" in line)
    return found
