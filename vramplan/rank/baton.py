"""Compiling DeepSpeed's operators, of which torch keeps a lock file that a killed compiler leaves behind for ever."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from pathlib import Path
from typing import Any

from vramplan.emit.launch import process_identity

ABANDONED_AFTER_S = 600.0
"""For how long nothing is written to a build whose lock tells no owner (plain torch made it, perhaps on another host)
until it counts as abandoned."""
_PID_NAMESPACE = Path("/proc/self/ns/pid")


class CompilerEnded(RuntimeError):
    """Another process, of whatever run, was ended while it compiled what this one waited for. It passes: who needs the
    operator next compiles it, and the supervisor (``supervise/classify.py``) starts the run again."""


def outlive_killed_compilers() -> None:
    """From now on torch's compiles in this process take over locks whose owner is dead, instead of waiting for them.

    torch/utils/file_baton.py (2.13) makes an empty file ``lock`` beside the build, and removes it when the compile
    ends; ``cpp_extension.py:2345`` and on. A process that is killed in between, as an interrupted first run is, leaves
    it there, and whoever needs the operator next waits without end. Who lives is known by ``/proc``: where a system
    has none (only Linux has it), torch's own way stays.
    """
    if not _PID_NAMESPACE.exists():
        return
    from torch.utils import cpp_extension
    from torch.utils.file_baton import FileBaton

    class Baton(FileBaton):
        """As torch's; its lock says who holds it."""

        def try_acquire(self) -> bool | None:
            with _Alone(Path(f"{self.lock_file_path}.guard")):  # of two that find it abandoned one takes it over
                if is_abandoned(Path(self.lock_file_path)):
                    os.remove(self.lock_file_path)
                taken = super().try_acquire()
                if taken:
                    Path(self.lock_file_path).write_text(_own_name(), encoding="utf-8")
                return taken

        def wait(self) -> None:
            while os.path.exists(self.lock_file_path):
                if is_abandoned(Path(self.lock_file_path)):
                    raise CompilerEnded(
                        f"the process that compiled {Path(self.lock_file_path).parent.name} was ended: start again"
                    )
                time.sleep(self.wait_seconds)

    module: Any = cpp_extension
    module.FileBaton = Baton


def is_abandoned(lock: Path) -> bool:
    """Whether nobody compiles any more under a lock."""
    try:
        host, _, owner = lock.read_text(encoding="utf-8").partition(" ")
        if host == _host():
            return process_identity(int(owner.partition(":")[0])) != owner
        return time.time() - max(path.stat().st_mtime for path in (lock, *lock.parent.iterdir())) > ABANDONED_AFTER_S
    except (FileNotFoundError, ValueError):  # it has just been released, or its owner is about to write its name
        return False


def _own_name() -> str:
    return f"{_host()} {process_identity(os.getpid())}"


def _host() -> str:
    """The machine, and in which of its containers ids of processes mean the same."""
    return f"{socket.gethostname()}/{os.readlink(_PID_NAMESPACE)}"


class _Alone:
    """One process of a machine at a time; the kernel lets go of a file's lock when its holder dies."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        self._descriptor = os.open(self._path, os.O_CREAT | os.O_RDWR, 0o644)
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)
