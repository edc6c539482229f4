"""What the system counts of a process's work: bytes, pages and time on the CPU (proc(5))."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

LEAST_BYTES = 1 << 16
LEAST_FAULTS = 16
"""Between two looks: a process that waits does now and then read or write some bytes in other threads (its process
group's store, a tracker), and takes no pages; one that works moves far more in a second."""


@dataclass(frozen=True, slots=True)
class WorkDone:
    """Counts that only rise while a process lives; 0 where the system does not say."""

    num_bytes: int = 0
    """Read and written, the page cache's included. ``rchar`` and ``wchar`` count a call when it returns,
    ``read_bytes`` and ``write_bytes`` as it goes."""
    num_faults: int = 0
    """Pages taken."""
    cpu_ticks: int = 0
    """In user code and in the kernel; clock ticks, ``SC_CLK_TCK`` a second."""

    def __add__(self, other: WorkDone) -> WorkDone:
        return WorkDone(
            self.num_bytes + other.num_bytes, self.num_faults + other.num_faults, self.cpu_ticks + other.cpu_ticks
        )

    def __sub__(self, other: WorkDone) -> WorkDone:
        return self + WorkDone(-other.num_bytes, -other.num_faults, -other.cpu_ticks)

    @property
    def moves_memory(self) -> bool:
        """Whether so many bytes or pages between two looks are work."""
        return self.num_bytes >= LEAST_BYTES or self.num_faults >= LEAST_FAULTS


def work_done(who: str, *, waited_for: bool = True) -> WorkDone:
    """Of ``/proc/WHO``: ``io``, and fields 10 to 17 of ``stat``. The counts of a child are added to its parent's when
    that has waited for it (``waited_for`` leaves them in), so sums over living processes only rise."""
    num_bytes = faults = ticks = 0
    with suppress(OSError, ValueError, KeyError):
        counters = dict(line.split(": ") for line in Path(f"/proc/{who}/io").read_text(encoding="ascii").splitlines())
        num_bytes = sum(int(counters[name]) for name in ("rchar", "wchar", "read_bytes", "write_bytes"))
    with suppress(OSError, ValueError, IndexError):
        stat = Path(f"/proc/{who}/stat").read_text(encoding="utf-8", errors="replace")
        fields = [int(field) for field in stat.rpartition(")")[2].split()[7:15]]
        faults = sum(fields[:4] if waited_for else fields[:4:2])
        ticks = sum(fields[4:] if waited_for else fields[4:6])
    return WorkDone(num_bytes, faults, ticks)


def work_of_tree(who: str) -> WorkDone:
    """Of a process and of those below it."""
    return sum((work_done(each) for each in (who, *_descendants(who))), WorkDone())


def _descendants(who: str) -> Iterator[str]:
    """Ids of the processes below one, where the system lists them (``/proc/PID/task/TID/children``)."""
    for path in Path(f"/proc/{who}/task").glob("*/children"):
        with suppress(OSError):
            for child in path.read_text(encoding="ascii").split():
                yield child
                yield from _descendants(child)
