"""Bytes of the host that torch holds for pinned tensors: its caching allocator of page-locked memory. No torch here."""

from __future__ import annotations

from collections import Counter

import numpy as np
import numpy.typing as npt

from vramplan.memory.term import Place
from vramplan.simulate.trace import Trace


def pinned_curve(trace: Trace) -> npt.NDArray[np.int64]:
    """Bytes held after each instant of a trace (element 0: before the first).

    A block is as large as the next power of two; one that is let go of is kept, and handed out again for a tensor that
    needs as much (torch 2.13, ATen/core/CachingHostAllocator.h:282, ``allocate``, and :621, ``get_free_block``).
    """
    grown = np.zeros(trace.num_instants + 1, np.int64)
    free: Counter[int] = Counter()
    for instant, block, is_birth in trace.events(Place.PINNED):
        size = 1 << (trace.num_bytes[block] - 1).bit_length()
        if not is_birth:
            free[size] += 1
        elif free[size]:
            free[size] -= 1
        else:
            grown[instant + 1] += size
    return np.cumsum(grown)
