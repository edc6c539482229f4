"""PhaseProbe: how many bytes are allocated in each phase of a real run, on CUDA or on the CPU.

On CUDA the caching allocator counts by itself. The CPU allocator counts only while a profiler with
``profile_memory`` is on in the calling thread (c10/core/CPUAllocator.cpp, ``ProfiledCPUMemoryReporter``): it then
keeps a process-wide table of address and size, and reports every allocation and every free of an address in the
table. The table outlives a profiling session, so a block that an earlier session saw born is seen to die in a
later one; a block born while no session was on is never seen. Hence the probe, once started, profiles without a
gap: at each edge of a phase it closes one session, reads its events and opens the next.

A block that another thread frees (gloo's, holding a collective's buffers) is not seen to die. Who waits for a
collective therefore waits for gloo to let go of its tensors. What is left is taken back as its address, or one inside
the block, is handed out again.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol, Self

import torch

from vramplan.measure.blocks import LiveBlocks, MemoryEvent
from vramplan.measure.record import PhaseReading
from vramplan.measure.settled import SettledCollectives
from vramplan.measure.trace import BirthReader

# Kineto writes a line on every start and stop; it reads this when its logger is first used.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")


class _Meter(Protocol):
    """What a device answers about one phase."""

    live_at_peak: dict[int, MemoryEvent]

    def begin(self) -> None: ...

    def end(self, phase: str) -> PhaseReading: ...

    def pause(self) -> None: ...

    def close(self) -> None: ...


class PhaseProbe:
    """Measures a run phase by phase::

        with PhaseProbe(torch.device("cpu")) as probe:
            with probe.phase("model_load"):
                ...
            with probe.phase("step1.micro1.forward"):
                ...
        probe.readings

    Open it before the first tensor that shall count. Phases do not nest. With ``births``, a reader of where blocks
    are born, the blocks alive at each phase's peak are kept under ``live_at_peak`` (on the CPU; several times slower).
    """

    def __init__(self, device: torch.device | str, *, births: BirthReader | None = None) -> None:
        self.device = torch.device(device)
        self.readings: list[PhaseReading] = []
        self.live_at_peak: dict[str, dict[int, MemoryEvent]] = {}
        self._meter: _Meter = _CudaMeter(self.device) if self.device.type == "cuda" else _CpuMeter(births)
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
            if self._meter.live_at_peak:
                self.live_at_peak[name] = self._meter.live_at_peak
            self._open = None

    def pause(self) -> None:
        """Stops counting until the next phase, which is taken to begin with what is alive now. What was alive before
        and dies after is not seen to die on the CPU."""
        self._meter.pause()

    def close(self) -> None:
        """Stops counting; readings stay."""
        self._meter.close()


class _CudaMeter:
    """Reads torch's caching allocator and the driver."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.live_at_peak: dict[int, MemoryEvent] = {}
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

    def pause(self) -> None:
        """Costs nothing between phases."""

    def close(self) -> None:
        pass

    def _stat(self, key: str) -> int:
        return int(torch.cuda.memory_stats(self.device).get(key, 0))


class _CpuMeter:
    """Adds up the CPU allocator's memory events."""

    def __init__(self, births: BirthReader | None) -> None:
        self.live_at_peak: dict[int, MemoryEvent] = {}
        self._births = births
        self._live = LiveBlocks()
        self._collectives = SettledCollectives()
        self._running = False
        self._start()

    def begin(self) -> None:
        if self._running:
            for event in self._harvest():
                self._live.apply(event)
        else:
            self._live = LiveBlocks.starting_with(self._live.num_bytes)
            self._start()
        self._live.reset_peak()

    def end(self, phase: str) -> PhaseReading:
        events = self._harvest()
        if self._births is None:
            for event in events:
                self._live.apply(event)
        else:
            self.live_at_peak = self._live.apply_to_peak(_in_phase(events, phase))
        return PhaseReading(phase, self._live.peak_bytes, self._live.num_bytes)

    def pause(self) -> None:
        if self._running:
            for event in self._stop():
                self._live.apply(event)
            self._collectives.remove()

    def close(self) -> None:
        if self._running:
            self._stop()
            self._collectives.remove()

    def _harvest(self) -> list[MemoryEvent]:
        events = self._stop()
        self._start()
        return events

    def _start(self) -> None:
        profiler = torch._C._profiler
        config = profiler.ProfilerConfig(
            profiler.ProfilerState.KINETO,
            False,  # report_input_shapes
            True,  # profile_memory
            self._births is not None,  # with_stack
            False,  # with_flops
            False,  # with_modules
            profiler._ExperimentalConfig(),
        )
        cpu = {profiler.ProfilerActivity.CPU}
        torch._C._autograd._prepare_profiler(config, cpu)
        # Without births only user annotations are recorded besides memory: operators would cost time for nothing.
        scopes = set() if self._births is not None else {profiler.RecordScope.USER_SCOPE}
        torch._C._autograd._enable_profiler(config, cpu, scopes)  # type: ignore[call-arg]  # the stub lacks scopes
        self._collectives.install()
        self._running = True

    def _stop(self) -> list[MemoryEvent]:
        self._running = False
        result = torch._C._autograd._disable_profiler()
        tree = result.experimental_event_tree()
        events = _memory_events(tree) if self._births is None else self._births.read(tree)
        return sorted(events, key=lambda event: event.time_ns)


def _memory_events(tree: list[Any]) -> Iterator[MemoryEvent]:
    stack = tree[::-1]
    while stack:
        event = stack.pop()
        stack.extend(event.children[::-1])
        if event.tag == torch._C._profiler._EventType.Allocation:
            fields = event.extra_fields
            if fields.device.type == "cpu":
                yield MemoryEvent(event.start_time_ns, fields.ptr, fields.alloc_size)


def _in_phase(events: list[MemoryEvent], phase: str) -> list[MemoryEvent]:
    """The same events, their births marked with the phase."""
    return [
        replace(event, birth=replace(event.birth, phase=phase)) if event.birth is not None else event
        for event in events
    ]
