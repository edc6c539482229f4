"""The process that measures: imports everything once, then forks a child for each job it is sent.

A child has a fresh device context of its own, and an out-of-memory or a crash dies with it. Protocol: one JSON
object a line on stdin (``job``, ``out``, ``trace``); the child writes its record to the file ``out`` after every
phase; when a child has ended, one line on stdout (``out``, ``exit``).
"""

from __future__ import annotations

import json
import os
import select
import sys
import traceback
from pathlib import Path
from typing import Any

from vramplan.measure.job import measure_job
from vramplan.measure.record import JobSpec


def serve() -> None:
    """Forks children until stdin closes and the last of them has ended."""
    _import_everything()
    children: dict[int, str] = {}
    requests = _Lines(sys.stdin.fileno())
    while children or not requests.closed:
        for line in requests.read(timeout_s=0.05):
            request = json.loads(line)
            children[_fork(request)] = request["out"]
        while children:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            reply = {"out": children.pop(pid), "exit": os.waitstatus_to_exitcode(status)}
            sys.stdout.write(json.dumps(reply) + "\n")
            sys.stdout.flush()


def _fork(request: dict[str, Any]) -> int:
    """Pid of a child that runs the request and exits."""
    pid = os.fork()
    if pid:
        return pid
    exit_code = 1
    try:
        # the parent's pipes are its own: what libraries print here must not read as a reply
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(2, 1)
        measure_job(JobSpec.model_validate(request["job"]), Path(request["out"]), trace=request["trace"])
        exit_code = 0
    except BaseException:  # noqa: BLE001 - the child must end here and not go on as a second server
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(exit_code)


def _import_everything() -> None:
    """What every job needs; none of it touches a device or starts a thread."""
    import deepspeed  # noqa: F401
    import peft  # noqa: F401
    import transformers  # noqa: F401


class _Lines:
    """Whole lines of a file descriptor as they come."""

    def __init__(self, descriptor: int) -> None:
        self.closed = False
        self._descriptor = descriptor
        self._rest = b""

    def read(self, timeout_s: float) -> list[str]:
        if self.closed or not select.select([self._descriptor], [], [], timeout_s)[0]:
            return []
        chunk = os.read(self._descriptor, 1 << 16)
        self.closed = not chunk
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        return [line.decode() for line in lines if line.strip()]


if __name__ == "__main__":
    serve()
