"""This machine's host: memory that a process may use, shared memory, cores. Reads ``/proc`` and ``/sys`` only."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

# cgroup v1 writes "no limit" as a page-rounded 2**63 - 1; anything this large is no limit.
_UNLIMITED = 2**60


@dataclass(frozen=True, slots=True)
class Host:
    """What the host offers; None where this system does not say."""

    memory_total_bytes: int | None
    memory_available_bytes: int | None
    memory_limit_bytes: int | None
    """The smallest limit of the control groups that hold this process; None without one."""
    shm_total_bytes: int | None
    shm_free_bytes: int | None
    num_cpus: int

    @property
    def memory_bytes(self) -> int | None:
        """Memory that this process may use at most: the machine's, or the control group's if that is less."""
        known = [size for size in (self.memory_total_bytes, self.memory_limit_bytes) if size is not None]
        return min(known, default=None)


def read_host(root: Path = Path("/")) -> Host:
    """The host under ``root`` (``/`` but for tests)."""
    meminfo = _meminfo(root / "proc/meminfo")
    shm_total, shm_free = _shared_memory(root / "dev/shm")
    return Host(
        memory_total_bytes=meminfo.get("MemTotal"),
        memory_available_bytes=meminfo.get("MemAvailable"),
        memory_limit_bytes=cgroup_limit_bytes(root),
        shm_total_bytes=shm_total,
        shm_free_bytes=shm_free,
        num_cpus=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
    )


def node_identity() -> str:
    """Where ids of processes mean the same: host name, boot and namespace of process ids."""
    namespace = ""
    with suppress(OSError):
        namespace = os.readlink("/proc/self/ns/pid")
    return f"{platform.node()}/{_text(Path('/proc/sys/kernel/random/boot_id')).strip()}/{namespace}"


def cgroup_limit_bytes(root: Path = Path("/")) -> int | None:
    """The smallest memory limit among this process's control group and its parents (v1 or v2)."""
    limits = []
    for directory, file_name in _cgroup_directories(root):
        text = _text(directory / file_name).strip()
        if text.isdigit() and int(text) < _UNLIMITED:
            limits.append(int(text))
    return min(limits, default=None)


def oom_kill_counts(root: Path = Path("/"), process: str = "self") -> dict[Path, int]:
    """Processes that the kernel has killed for want of memory so far, by the file that counts them: in the control
    groups of ``process`` (an id; empty when it is gone), and on the whole machine. Only a rise tells something.

    Counted in v2's ``memory.events``, in v1's ``memory.oom_control`` (Linux 4.13, not added up to the parents there)
    and in ``/proc/vmstat``.
    """
    names = {"memory.max": "memory.events", "memory.limit_in_bytes": "memory.oom_control"}
    groups = [directory / names[limit] for directory, limit in _cgroup_directories(root, process)]
    counts = {path: _counter(path, "oom_kill") for path in (*groups, root / "proc/vmstat")}
    return {path: count for path, count in counts.items() if count is not None}


def _counter(path: Path, name: str) -> int | None:
    words = (line.split() for line in _text(path).splitlines())
    return next((int(line[1]) for line in words if len(line) == 2 and line[0] == name), None)


def _cgroup_directories(root: Path, process: str = "self") -> list[tuple[Path, str]]:
    """Directories that may hold a limit of a process, with the name of the file that holds it."""
    found = []
    for line in _text(root / "proc" / process / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, file_name = root / "sys/fs/cgroup", "memory.max"
        elif "memory" in controllers.split(","):
            base, file_name = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
        else:
            continue
        directory = base / path.lstrip("/")
        found += [(parent, file_name) for parent in (directory, *directory.parents) if parent.is_relative_to(base)]
    return found


def _meminfo(path: Path) -> dict[str, int]:
    """Fields of ``/proc/meminfo`` in bytes (it writes KiB and says kB)."""
    values = {}
    for line in _text(path).splitlines():
        name, _, rest = line.partition(":")
        words = rest.split()
        if words and words[0].isdigit():
            values[name] = int(words[0]) * 1024
    return values


def _shared_memory(path: Path) -> tuple[int | None, int | None]:
    try:
        stats = os.statvfs(path)
    except OSError:
        return None, None
    return stats.f_frsize * stats.f_blocks, stats.f_frsize * stats.f_bavail


def _text(path: Path) -> str:
    """The file's text; empty where this system has no such file."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
