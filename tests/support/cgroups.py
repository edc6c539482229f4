"""Memory control groups for real kills by the kernel, where this machine lets us make them (v1 and v2)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from vramplan.facts.host import oom_kill_counts

LIMITS = ("memory.limit_in_bytes", "memory.max")
COUNTERS = ("memory.oom_control", "memory.events")
_BASES = (Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup"))


class NoGroup(Exception):
    """No memory control group can be made here; the text says why."""


@contextlib.contextmanager
def memory_group(name: str) -> Iterator[Path]:
    """A control group without a limit yet, below this process's own or at the top; removed at the end.

    Raises:
        NoGroup: this machine has no controller for memory, or does not let us.
    """
    group = _made(name)
    try:
        yield group
    finally:
        with contextlib.suppress(OSError):  # a rank that is still ending
            group.rmdir()


def oom_kills_of(group: Path) -> int:
    """How many processes the kernel has killed in it."""
    text = "".join((group / each).read_text() for each in COUNTERS if (group / each).exists())
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith("oom_kill "))


def _made(name: str) -> Path:
    reasons = []
    for parent in _parents():
        group = parent / name
        try:
            group.mkdir()
            limit = next((group / each for each in LIMITS if (group / each).exists()), None)
            if limit is not None:
                limit.write_text(str(2**40))
                return group
            reasons.append(f"{parent} does not pass its memory controller on")
            group.rmdir()
        except OSError as error:
            reasons.append(f"{group}: {error.strerror}")
            with contextlib.suppress(OSError):
                group.rmdir()
    raise NoGroup("; ".join(reasons) or "no control group of this process counts memory")


def _parents() -> list[Path]:
    """Where a group may be made: beside what counts for this process, from its own group up."""
    counted = (path.parent for path in oom_kill_counts() if path.name != "vmstat")
    return [*dict.fromkeys([*counted, *(base for base in _BASES if any((base / each).exists() for each in LIMITS))])]
