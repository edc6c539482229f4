"""Memory events of the CPU allocator, and the blocks that they leave alive."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass

from vramplan.memory.birth import Birth


@dataclass(frozen=True, slots=True)
class MemoryEvent:
    """One allocation (``num_bytes`` > 0) or free (< 0) of the CPU allocator, at ``address``."""

    time_ns: int
    address: int
    num_bytes: int
    birth: Birth | None = None


class LiveBlocks:
    """The blocks now allocated, their sum and its highest value since ``reset_peak``."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self.peak_bytes = 0
        self.at: dict[int, MemoryEvent] = {}
        """The allocation of each live block, by address."""
        self._addresses: list[int] = []

    @classmethod
    def starting_with(cls, num_bytes: int) -> LiveBlocks:
        """With bytes that stay, whose blocks are not known."""
        live = cls()
        live.num_bytes = live.peak_bytes = num_bytes
        return live

    def reset_peak(self) -> None:
        self.peak_bytes = self.num_bytes

    def apply(self, event: MemoryEvent) -> None:
        if event.num_bytes < 0:
            self._drop(event.address)
            return
        self._drop_overlapping(event.address, event.num_bytes)
        self._addresses.insert(bisect_left(self._addresses, event.address), event.address)
        self.at[event.address] = event
        self.num_bytes += event.num_bytes
        self.peak_bytes = max(self.peak_bytes, self.num_bytes)

    def apply_to_peak(self, events: Iterable[MemoryEvent]) -> dict[int, MemoryEvent]:
        """Applies all events; the blocks alive when the sum was highest (the first time), by address."""
        events = list(events)
        started = self._copy()
        self.reset_peak()
        highest_at, highest = 0, self.num_bytes
        for index, event in enumerate(events, start=1):
            self.apply(event)
            if self.num_bytes > highest:
                highest_at, highest = index, self.num_bytes
        for event in events[:highest_at]:
            started.apply(event)
        return started.at

    def _copy(self) -> LiveBlocks:
        other = LiveBlocks()
        other.num_bytes, other.at, other._addresses = self.num_bytes, dict(self.at), list(self._addresses)
        return other

    def _drop(self, address: int) -> None:
        event = self.at.pop(address, None)
        if event is not None:  # None: freed unseen, and taken back already when its space was handed out again
            del self._addresses[bisect_left(self._addresses, address)]
            self.num_bytes -= event.num_bytes

    def _drop_overlapping(self, address: int, num_bytes: int) -> None:
        """A block inside the space now handed out was freed unseen (by another thread)."""
        first = bisect_left(self._addresses, address)
        if first and self._addresses[first - 1] + self.at[self._addresses[first - 1]].num_bytes > address:
            first -= 1
        last = bisect_left(self._addresses, address + num_bytes)
        for stale in self._addresses[first:last]:
            self._drop(stale)
