"""A trace as a snapshot of torch's caching allocator, which pytorch.org/memory_viz opens.

The form is that of ``torch.cuda.memory._dump_snapshot`` (torch/cuda/_memory_viz.py; c10/cuda/CUDACachingAllocator.h,
``SegmentInfo`` and ``TraceEntry``). No torch here.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from vramplan.memory.birth import Birth
from vramplan.simulate.allocator import CachingAllocator, OutOfMemory
from vramplan.simulate.block import Block
from vramplan.simulate.trace import Trace
from vramplan.spec.alloc_conf import AllocConf


def write_snapshot(
    trace: Trace, path: Path, conf: AllocConf | None = None, limit_bytes: int | None = None
) -> dict[str, Any]:
    """Replays the trace and writes the snapshot at its end, or at the first allocation that fails; returns it."""
    snapshot = _Recorder(trace, conf or AllocConf(), limit_bytes).snapshot()
    with path.open("wb") as file:
        pickle.dump(snapshot, file)
    return snapshot


class _Recorder:
    """Replays a trace and keeps what torch's recorder keeps."""

    def __init__(self, trace: Trace, conf: AllocConf, limit_bytes: int | None) -> None:
        self._trace = trace
        self._entries: list[dict[str, Any]] = []
        self._instant = 0
        self._allocator = CachingAllocator(conf, limit_bytes, self._on_segment)
        self._live: dict[int, tuple[Block, int]] = {}
        """By address: the block, and its number in the trace."""
        self._frames = cache(_frames)

    def snapshot(self) -> dict[str, Any]:
        self._replay()
        return {
            "segments": [segment for first in self._allocator.segments.values() for segment in self._segments(first)],
            "device_traces": [self._entries],
            "allocator_settings": {"expandable_segments": self._allocator.conf.expandable_segments},
            "external_annotations": [],
        }

    def _replay(self) -> None:
        blocks: dict[int, Block] = {}
        emptied = sorted(self._trace.cache_emptied_at, reverse=True)
        for instant, number, is_birth in self._trace.events():
            self._instant = instant
            while emptied and emptied[-1] <= self._instant:
                emptied.pop()
                self._allocator.empty_cache()
            size, stream = self._trace.num_bytes[number], self._trace.stream[number]
            if not is_birth:
                block = blocks.pop(number)
                del self._live[block.address]
                for action in ("free_requested", "free_completed"):
                    self._note(action, block.address, size, stream, number)
                self._allocator.free(block)
                continue
            try:
                block = blocks[number] = self._allocator.malloc(size, stream)
            except OutOfMemory:
                self._note("oom", 0, size, stream, number)
                self._entries[-1]["device_free"] = self._allocator.limit_bytes - self._allocator.reserved_bytes
                return
            self._live[block.address] = (block, number)
            self._note("alloc", block.address, size, stream, number)

    def _on_segment(self, action: str, address: int, size: int, stream: int) -> None:
        self._note(action, address, size, stream, None)

    def _note(self, action: str, address: int, size: int, stream: int, number: int | None) -> None:
        frames = [] if number is None else self._frames(self._birth_of(number))
        self._entries.append(
            {
                "action": action,
                "addr": address,
                "size": size,
                "stream": stream,
                "time_us": self._instant,  # a simulation has no clock: one microsecond an event
                "compile_context": "N/A",
                "user_metadata": "",
                "frames": frames,
            }
        )

    def _birth_of(self, number: int) -> Birth:
        return self._trace.births[self._trace.birth[number]]

    def _segments(self, first: Block) -> Iterator[dict[str, Any]]:
        """What is mapped of a segment, in one piece or, of an expandable one, in several."""
        run: list[Block] = []
        block: Block | None = first
        while block is not None:
            if block.mapped:
                run.append(block)
            elif run:
                yield self._segment(run)
                run = []
            block = block.next
        if run:
            yield self._segment(run)

    def _segment(self, blocks: list[Block]) -> dict[str, Any]:
        described = [self._block(block) for block in blocks]
        active = [block for block in described if block["state"] == "active_allocated"]
        first = blocks[0]
        return {
            "device": 0,
            "address": first.address,
            "total_size": sum(block.size for block in blocks),
            "allocated_size": sum(block["size"] for block in active),
            "active_size": sum(block["size"] for block in active),
            "requested_size": sum(block["requested_size"] for block in active),
            "stream": first.stream,
            "segment_type": "small" if first.pool.is_small else "large",
            "segment_pool_id": (0, 0),
            "is_expandable": first.is_expandable,
            "frames": [],
            "blocks": described,
        }

    def _block(self, block: Block) -> dict[str, Any]:
        common = {"address": block.address, "size": block.size}
        found = self._live.get(block.address) if block.allocated else None
        if found is None:
            return common | {"requested_size": 0, "state": "inactive", "frames": []}
        _, number = found
        size, frames = self._trace.num_bytes[number], self._frames(self._birth_of(number))
        return common | {"requested_size": size, "state": "active_allocated", "frames": frames}


def _frames(birth: Birth) -> list[dict[str, Any]]:
    """Innermost first, as torch has them: the operator, the lines of Python, the module and the phase."""
    frames = [{"name": birth.node or birth.op or "unknown", "filename": "operator", "line": 0}]
    for text in filter(None, (birth.frame, birth.outer_frame)):
        place, _, function = text.rpartition(" ")
        filename, _, line = place.rpartition(":")
        frames.append({"name": function, "filename": filename or text, "line": int(line) if line.isdecimal() else 0})
    if birth.module:
        frames.append({"name": birth.module, "filename": "module", "line": 0})
    if birth.phase:
        frames.append({"name": birth.phase, "filename": "phase", "line": 0})
    return frames
