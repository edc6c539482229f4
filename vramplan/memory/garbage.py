"""Python's own search for cycles, which a walk of the tape does without."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Without Python's search for cycles, which a walk's many small objects set off again and again to find none: a
    tensor of the tape is freed by its count of references. A third of a walk's time."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
