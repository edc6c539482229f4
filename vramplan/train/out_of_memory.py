"""The last words of a rank that ran out of memory: bytes kept back so that it can speak, and what it reads."""

from __future__ import annotations

import mmap
import resource
from contextlib import suppress
from pathlib import Path
from typing import Any

from vramplan.facts.host import read_host
from vramplan.measure.marker import MemoryState, requested_bytes

_RESERVE_BYTES = 8 * 2**20
"""Enough to format a traceback and write a file where not a page is left."""


class Reserve:
    """Memory of the process's own that is given back when there is no other. Written to, so that it is really there."""

    def __init__(self, num_bytes: int = _RESERVE_BYTES) -> None:
        self.num_bytes = num_bytes
        self._block: mmap.mmap | None = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        for start in range(0, num_bytes, mmap.PAGESIZE):
            self._block[start] = 1

    def release(self) -> None:
        """Gives the memory back to the system (a freed allocation of malloc's might stay with the process)."""
        if self._block is not None:
            self._block.close()
            self._block = None


def memory_state(message: str, baseline_bytes: int, reserve_bytes: int, *, of_host: bool = False) -> MemoryState:
    """What this rank held and had left, of the host's memory where that ran out (``of_host``). ``baseline_bytes``:
    ``data_bytes`` before the model was loaded; ``reserve_bytes``: of the process's own memory that was given back since
    the failure."""
    requested = requested_bytes(message)
    with suppress(Exception):  # after an error of the driver its own figures may not be had either
        torch = None if of_host else _torch_with_cuda()
        if torch is not None:
            free, _ = torch.cuda.mem_get_info()
            return MemoryState(requested, torch.cuda.memory_allocated(), torch.cuda.memory_reserved(), free)
    data = data_bytes() + reserve_bytes
    return MemoryState(requested, None, max(0, data - baseline_bytes), _free_bytes(data))


def data_bytes() -> int:
    """This process's writable private memory (VmData), which RLIMIT_DATA limits; 0 where the system does not say."""
    with suppress(OSError, ValueError, IndexError):
        text = Path("/proc/self/status").read_text(encoding="ascii")
        return int(text.partition("VmData:")[2].split(maxsplit=1)[0]) * 1024
    return 0


def _free_bytes(data: int) -> int | None:
    limit, _ = resource.getrlimit(resource.RLIMIT_DATA)
    if limit != resource.RLIM_INFINITY:
        return max(0, limit - data)
    return read_host().memory_available_bytes


def _torch_with_cuda() -> Any | None:
    import sys

    torch = sys.modules.get("torch")  # a rank that failed before it imported torch holds nothing on a device
    return torch if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized() else None
