"""Waits until the memory of ended processes is free again: a driver may need a moment after a process is gone."""

from __future__ import annotations

import time
from collections.abc import Callable

from vramplan.facts.host import read_host
from vramplan.facts.nvml import read_driver

PATIENCE_S = 30.0
_ENOUGH_FRAC = 0.95
"""Of what was free before the run; others use the machine too."""
_POLL_S = 0.2

FreeBytes = tuple[int, ...]


def free_bytes() -> FreeBytes:
    """Bytes that are free now, of the host and of each visible GPU."""
    driver = read_driver()
    host = read_host().memory_available_bytes or 0
    return (host, *(gpu.free_bytes for gpu in (driver.gpus if driver is not None else ())))


def wait_until_free(
    before: FreeBytes, read: Callable[[], FreeBytes] = free_bytes, patience_s: float = PATIENCE_S
) -> bool:
    """Returns when about as much is free as ``before``, or after ``patience_s``; whether it is."""
    deadline = time.monotonic() + patience_s
    while True:
        if all(now >= then * _ENOUGH_FRAC for now, then in zip(read(), before, strict=False)):
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_S)
