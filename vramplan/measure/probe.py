"""PhaseProbe: how many bytes are allocated in each phase of a real run, on CUDA or on the CPU.

On CUDA the caching allocator counts by itself. The CPU allocator counts only while a profiler with
``profile_memory`` is on in the calling thread (c10/core/CPUAllocator.cpp, ``ProfiledCPUMemoryReporter``): it then
keeps a process-wide table of address and size, and reports every allocation and every free of an address in the
table. The table outlives a profiling session, so a block that an earlier session saw born is seen to die in a
later one; a block born while no session was on is never seen. Hence the probe, once started, profiles without a
gap: at each edge of a phase it closes one session, reads its events and opens the next.

A block that another thread frees (gloo's, holding a collective's buffers) is not seen to die. Its address, or one
inside it, is handed out again sooner or later: what such a block held is taken back then.
"""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch

from vramplan.measure.record import PhaseReading

# Kineto writes a line on every start and stop; it reads this when its logger is first used.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")


@dataclass(frozen=True, slots=True)
class MemoryEvent:
    """One allocation (``num_bytes`` > 0) or free (< 0) of the CPU allocator, at ``address``."""

    time_ns: int
    address: int
    num_bytes: int


class _Meter(Protocol):
    """What a device answers about one phase."""

    def begin(self) -> None: ...

    def end(self, phase: str) -> PhaseReading: ...

    def close(self) -> None: ...


class PhaseProbe:
    """Measures a run phase by phase::

        with PhaseProbe(torch.device("cpu")) as probe:
            with probe.phase("model_load"):
                ...
            with probe.phase("step1.micro1.forward"):
                ...
        probe.readings

    Open it before the first tensor that shall count. Phases do not nest. ``keep_events`` keeps the CPU's memory
    events of each phase under ``events`` (for a trace of what is alive at the peak).
    """

    def __init__(self, device: torch.device | str, *, keep_events: bool = False) -> None:
        self.device = torch.device(device)
        self.readings: list[PhaseReading] = []
        self._meter: _Meter = _CudaMeter(self.device) if self.device.type == "cuda" else _CpuMeter(keep_events)
        self._open: str | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Everything inside is counted to phase ``name``; its reading is there afterwards, also after an error."""
        if self._open is not None:
            raise RuntimeError(f"phase {name!r} opened inside phase {self._open!r}")
        self._open = name
        self._meter.begin()
        try:
            yield
        finally:
            self.readings.append(self._meter.end(name))
            self._open = None

    @property
    def events(self) -> dict[str, list[MemoryEvent]]:
        """The CPU's memory events by phase, where they were asked for."""
        return self._meter.events if isinstance(self._meter, _CpuMeter) else {}

    def close(self) -> None:
        """Stops counting; readings stay."""
        self._meter.close()


class _CudaMeter:
    """Reads torch's caching allocator and the driver."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._retries = 0

    def begin(self) -> None:
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        self._retries = self._stat("num_alloc_retries")

    def end(self, phase: str) -> PhaseReading:
        torch.cuda.synchronize(self.device)
        free, total = torch.cuda.mem_get_info(self.device)
        reserved_peak, reserved_end = self._stat("reserved_bytes.all.peak"), self._stat("reserved_bytes.all.current")
        return PhaseReading(
            phase=phase,
            allocated_peak_bytes=self._stat("allocated_bytes.all.peak"),
            allocated_end_bytes=self._stat("allocated_bytes.all.current"),
            reserved_peak_bytes=reserved_peak,
            reserved_end_bytes=reserved_end,
            alloc_retries=self._stat("num_alloc_retries") - self._retries,
            # The driver keeps no peak: what torch reserved at most is added to what is not torch's now.
            used_peak_bytes=total - free - reserved_end + reserved_peak,
        )

    def close(self) -> None:
        pass

    def _stat(self, key: str) -> int:
        return int(torch.cuda.memory_stats(self.device).get(key, 0))


class _CpuMeter:
    """Adds up the CPU allocator's memory events."""

    def __init__(self, keep_events: bool) -> None:
        self.events: dict[str, list[MemoryEvent]] = {}
        self._keep = keep_events
        self._live = LiveBlocks()
        self._running = False
        self._start()

    def begin(self) -> None:
        self._harvest()
        self._live.reset_peak()

    def end(self, phase: str) -> PhaseReading:
        events = self._harvest()
        if self._keep:
            self.events[phase] = events
        return PhaseReading(phase, self._live.peak_bytes, self._live.num_bytes)

    def close(self) -> None:
        if self._running:
            self._stop()

    def _harvest(self) -> list[MemoryEvent]:
        events = self._stop()
        self._start()
        for event in events:
            self._live.apply(event)
        return events

    def _start(self) -> None:
        profiler = torch._C._profiler
        config = profiler.ProfilerConfig(
            profiler.ProfilerState.KINETO,
            False,  # report_input_shapes
            True,  # profile_memory
            False,  # with_stack
            False,  # with_flops
            False,  # with_modules
            profiler._ExperimentalConfig(),
        )
        cpu = {profiler.ProfilerActivity.CPU}
        torch._C._autograd._prepare_profiler(config, cpu)
        # Only user annotations are recorded besides memory: operators would cost time and space for nothing.
        scopes = {profiler.RecordScope.USER_SCOPE}
        torch._C._autograd._enable_profiler(config, cpu, scopes)  # type: ignore[call-arg]  # the stub lacks scopes
        self._running = True

    def _stop(self) -> list[MemoryEvent]:
        self._running = False
        result = torch._C._autograd._disable_profiler()
        return sorted(_memory_events(result.experimental_event_tree()), key=lambda event: event.time_ns)


class LiveBlocks:
    """The blocks now allocated, their sum and its highest value."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self.peak_bytes = 0
        self._size_at: dict[int, int] = {}
        self._addresses: list[int] = []

    def reset_peak(self) -> None:
        self.peak_bytes = self.num_bytes

    def apply(self, event: MemoryEvent) -> None:
        if event.num_bytes < 0:
            self._drop(event.address)
            return
        self._drop_overlapping(event.address, event.num_bytes)
        self._addresses.insert(bisect_left(self._addresses, event.address), event.address)
        self._size_at[event.address] = event.num_bytes
        self.num_bytes += event.num_bytes
        self.peak_bytes = max(self.peak_bytes, self.num_bytes)

    def _drop(self, address: int) -> None:
        size = self._size_at.pop(address, None)
        if size is not None:  # None: freed unseen, and taken back already when its space was handed out again
            del self._addresses[bisect_left(self._addresses, address)]
            self.num_bytes -= size

    def _drop_overlapping(self, address: int, num_bytes: int) -> None:
        first = bisect_left(self._addresses, address)
        if first and self._addresses[first - 1] + self._size_at[self._addresses[first - 1]] > address:
            first -= 1
        last = bisect_left(self._addresses, address + num_bytes)
        for stale in self._addresses[first:last]:
            self._drop(stale)


def _memory_events(tree: list[Any]) -> Iterator[MemoryEvent]:
    stack = tree[::-1]
    while stack:
        event = stack.pop()
        stack.extend(event.children[::-1])
        if event.tag == torch._C._profiler._EventType.Allocation:
            fields = event.extra_fields
            if fields.device.type == "cpu":
                yield MemoryEvent(event.start_time_ns, fields.ptr, fields.alloc_size)
