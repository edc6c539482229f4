"""Whether a rank goes on, apart from living: what its main thread tells, and what the system counts of its work.

A thread that beats lives on when the main one stands still, so the main one tells of each batch, parameter and chunk of
a file that it is through with. What it does inside one call of another library (a checkpoint that is written, weights
that are read) is seen from bytes and pages instead. Its time on the CPU says nothing: a collective that waits for a
peer may spin (DeepSpeed's all-reduce in shared memory, csrc/cpu/comm/shm.cpp, ``wait_buffer_state_until_2``).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_LEAST_BYTES = 1 << 16
_LEAST_FAULTS = 16
"""Between two looks: a rank that waits does now and then read or write some bytes in other threads (its process group's
store, a tracker), and takes no pages; one that works moves far more in a second."""


class Told:
    """What the main thread is through with, counted. One process is one rank, so there is one."""

    count = 0


def tell() -> None:
    """Says that the main thread has come further; cheap enough for every batch and every parameter."""
    Told.count += 1


class Activity:
    """Work of this process and of those that it started (a compiler), without the thread that looks: bytes read and
    written (the page cache's included), and pages taken."""

    def __init__(self) -> None:
        self._last = self._work()

    def look(self) -> bool:
        """Whether there was any since the last look; always by the same thread."""
        before, self._last = self._last, self._work()
        num_bytes, faults = (now - then for now, then in zip(self._last, before, strict=True))
        return num_bytes >= _LEAST_BYTES or faults >= _LEAST_FAULTS

    def _work(self) -> tuple[int, int]:
        all_counts = [_counted(who) for who in ("self", *_descendants("self"))]
        own_bytes, own_faults = _counted("thread-self", waited_for=False)
        return sum(each for each, _ in all_counts) - own_bytes, sum(each for _, each in all_counts) - own_faults


def _counted(who: str, *, waited_for: bool = True) -> tuple[int, int]:
    """(bytes, page faults) of ``/proc/WHO`` (proc(5): ``io``, and fields 10 to 13 of ``stat``); 0 where the system does
    not say. A child's counts are added to its parent's when that has waited for it, so sums over living processes only
    rise. ``rchar`` and ``wchar`` count a call when it returns, ``read_bytes`` and ``write_bytes`` as it goes."""
    num_bytes = faults = 0
    with suppress(OSError, ValueError, KeyError):
        counters = dict(line.split(": ") for line in Path(f"/proc/{who}/io").read_text(encoding="ascii").splitlines())
        num_bytes = sum(int(counters[name]) for name in ("rchar", "wchar", "read_bytes", "write_bytes"))
    with suppress(OSError, ValueError, IndexError):
        fields = Path(f"/proc/{who}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        faults = sum(map(int, fields[7:11] if waited_for else fields[7:11:2]))
    return num_bytes, faults


def _descendants(who: str) -> Iterator[str]:
    """Ids of the processes below one, where the system lists them (``/proc/PID/task/TID/children``)."""
    for path in Path(f"/proc/{who}/task").glob("*/children"):
        with suppress(OSError):
            for child in path.read_text(encoding="ascii").split():
                yield child
                yield from _descendants(child)
