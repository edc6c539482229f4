"""A trace replayed through the caching allocator: bytes reserved after each instant, and the first failure."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vramplan.simulate.allocator import CachingAllocator, OutOfMemory
from vramplan.simulate.block import Block
from vramplan.simulate.result import Failure
from vramplan.simulate.trace import Trace
from vramplan.spec.alloc_conf import AllocConf


@dataclass(frozen=True, slots=True)
class Replay:
    """What the allocator did with the trace's device blocks."""

    reserved: npt.NDArray[np.int64]
    """Bytes reserved after each instant (element 0: before the first)."""
    allocated: npt.NDArray[np.int64]
    """Bytes handed out, rounded as the allocator rounds."""
    alloc_retries: int
    failure: Failure | None

    def reserved_peak_bytes(self, start: int, end: int) -> int:
        """Highest reserved in a span of instants."""
        return int(self.reserved[start : end + 1].max())


def replay(trace: Trace, conf: AllocConf, limit_bytes: int | None = None) -> Replay:
    """Replays births and frees in order, up to the first allocation that fails.

    Plain Python: 2 to 3 microseconds an event, so a trace of a million events takes seconds
    (benchmarks/allocator_speed.py).
    """
    allocator = CachingAllocator(conf, limit_bytes)
    blocks: dict[int, Block] = {}
    reserved = np.zeros(trace.num_instants + 1, np.int64)
    allocated = np.zeros(trace.num_instants + 1, np.int64)
    emptied = sorted(trace.cache_emptied_at, reverse=True)
    last = 0
    for instant, number, is_birth in trace.events():
        while emptied and emptied[-1] <= instant:
            emptied.pop()
            allocator.empty_cache()
        reserved[last + 1 : instant + 1] = allocator.reserved_bytes
        allocated[last + 1 : instant + 1] = allocator.allocated_bytes
        if is_birth:
            try:
                blocks[number] = allocator.malloc(trace.num_bytes[number], trace.stream[number])
            except OutOfMemory:
                failure = _failure(trace, allocator, number, instant)
                return Replay(reserved, allocated, allocator.num_alloc_retries, failure)
        else:
            allocator.free(blocks.pop(number))
        reserved[instant + 1] = allocator.reserved_bytes
        allocated[instant + 1] = allocator.allocated_bytes
        last = instant + 1
    reserved[last + 1 :] = allocator.reserved_bytes
    allocated[last + 1 :] = allocator.allocated_bytes
    return Replay(reserved, allocated, allocator.num_alloc_retries, None)


def _failure(trace: Trace, allocator: CachingAllocator, number: int, instant: int) -> Failure:
    phase = next((span.name for span in trace.phases if span.start <= instant < span.end), "")
    birth = trace.births[trace.birth[number]]
    return Failure(phase, trace.num_bytes[number], allocator.allocated_bytes, allocator.reserved_bytes, birth)
