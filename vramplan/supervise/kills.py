"""Whether the kernel killed a rank for want of memory: its counters, looked at while the run goes.

They count the kills of everybody in a control group, or on the machine, and a run may last for days: only what was
counted shortly before a rank's end is held against its end.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path

from vramplan.facts.host import oom_kill_counts

RECENT_S = 30.0
"""A rank whose process is gone is noticed within a second; one that was only held up by its peer's end needs longer."""
_LOOK_EVERY_S = 1.0

Counts = dict[Path, int]


class KillCounter:
    """The counters of this process's control groups and of its ranks', which a scheduler may put elsewhere."""

    def __init__(
        self,
        read: Callable[[str], Counts] = lambda process: oom_kill_counts(process=process),
        recent_s: float = RECENT_S,
    ) -> None:
        self._read, self._recent_s = read, recent_s
        self._now: Counts = {}
        self._seen: deque[tuple[float, Counts]] = deque()
        self._pids: set[int] = set()
        self._look(time.monotonic())

    def look(self, pids: Iterable[int]) -> None:
        """Counts again, if it was not done in the last second. ``pids``: the ranks that live on this machine."""
        now, every = time.monotonic(), set(pids)
        if now - self._seen[-1][0] >= _LOOK_EVERY_S or not every <= self._pids:
            self._pids |= every
            self._look(now)

    def risen(self) -> int:
        """By how much the counters have risen lately, all together; one kill may be in several."""
        self._look(time.monotonic())
        _, before = self._seen[0]
        return sum(count - before.get(path, self._first(path)) for path, count in self._now.items())

    def _look(self, now: float) -> None:
        for process in ("self", *map(str, self._pids)):
            self._now.update(self._read(process))
        self._seen.append((now, dict(self._now)))
        while now - self._seen[0][0] > self._recent_s and len(self._seen) > 1:
            self._seen.popleft()

    def _first(self, path: Path) -> int:
        """Of a counter that came to be known lately: what it was then."""
        return next(counts[path] for _, counts in self._seen if path in counts)
