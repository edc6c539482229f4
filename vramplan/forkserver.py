"""A process that has imported everything and forks a child for each request; no torch is imported here.

A child has a fresh device context and a process group of its own, starts in milliseconds, and an out-of-memory or a
crash dies with it. The server is started as ``python -m MODULE``, whose main calls ``serve``; the client is
``ForkServer``. Protocol: one JSON object a line on stdin, with the file ``out`` that the child writes; when a child
has ended, one line on stdout (``out``, ``exit``).
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self


def path_with_own_bin() -> str:
    """``PATH`` with this Python's ``bin`` first: torch looks for ninja there when it compiles DeepSpeed's operators.

    Without it a run started as ``.venv/bin/vramplan`` would need the virtual environment to be activated.
    """
    own_bin = str(Path(sys.executable).parent)
    return os.pathsep.join([own_bin, os.environ.get("PATH") or os.defpath])


@dataclass(frozen=True, slots=True)
class Ended:
    """A child that has ended; ``exit_code`` is minus the signal that killed it."""

    out: Path
    exit_code: int


class ForkServer:
    """The client's end: submits requests and hears which have ended. A context manager; leaving it ends all."""

    def __init__(self, module: str, env: Mapping[str, str] | None = None, stderr: Path | None = None) -> None:
        self._stderr = stderr.open("ab") if stderr else None
        self._process = subprocess.Popen(  # -P: the working directory may hold a folder with a module's name
            [sys.executable, "-P", "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env={**os.environ, "PATH": path_with_own_bin(), **(env or {})},
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdin = self._process.stdin
        self._replies = _Lines(self._process.stdout.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(self, request: Mapping[str, Any], out: Path) -> None:
        """Starts a child for a request; it is told to write to ``out``."""
        self._stdin.write(json.dumps({**request, "out": str(out)}).encode() + b"\n")
        self._stdin.flush()

    def wait(self, timeout_s: float) -> list[Ended]:
        """The children that ended, as soon as there is one, or none after the timeout.

        Raises:
            RuntimeError: the server itself has ended.
        """
        lines = self._replies.read(timeout_s)
        if not lines and self._replies.closed:
            raise RuntimeError(f"the process that runs jobs ended with exit code {self._process.wait()}")
        return [Ended(Path(reply["out"]), reply["exit"]) for reply in map(json.loads, lines)]

    def close(self) -> None:
        """Ends the server and, with it, children that still run."""
        self._stdin.close()
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        if self._stderr is not None:
            self._stderr.close()


def serve(handle: Callable[[dict[str, Any]], None]) -> None:
    """The server's end: forks a child that handles each request, until stdin closes and the last child has ended; a
    client that was killed could not end them, so they are ended when it is gone."""
    children: dict[int, str] = {}
    client = os.getppid()
    signal.signal(signal.SIGTERM, lambda *_: _end(children))
    requests = _Lines(sys.stdin.fileno())
    while children or not requests.closed:
        for request in map(json.loads, requests.read(timeout_s=0.05)):
            children[_fork(handle, request)] = request["out"]
        if requests.closed and os.getppid() != client:
            _end(children)
        for pid, exit_code in _ended_children(children):
            sys.stdout.write(json.dumps({"out": children.pop(pid), "exit": exit_code}) + "\n")
            sys.stdout.flush()


def _fork(handle: Callable[[dict[str, Any]], None], request: dict[str, Any]) -> int:
    """Pid of a child that handles the request and exits."""
    pid = os.fork()
    if pid:
        return pid
    exit_code = 1
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        # the server's pipes are its own: what libraries print here must not read as a reply
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(2, 1)
        handle(request)
        exit_code = 0
    except BaseException:  # noqa: BLE001 - the child must end here and not go on as a second server
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(exit_code)


def _ended_children(children: Mapping[int, str]) -> Iterator[tuple[int, int]]:
    for pid in list(children):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            yield pid, os.waitstatus_to_exitcode(status)


def _end(children: Mapping[int, str]) -> None:
    for pid in children:
        os.kill(pid, signal.SIGKILL)
    os._exit(0)


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
