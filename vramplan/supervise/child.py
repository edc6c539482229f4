"""The launcher and everything it starts: one process group, begun and ended as a whole."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from vramplan.emit.launch import SUPERVISOR_VARIABLE, process_identity
from vramplan.forkserver import path_with_own_bin

GRACE_S = 5.0
"""How long processes may take to end by themselves before they are killed."""
_POLL_S = 0.05


class Child:
    """A started command in a process group of its own; its output goes to a file."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        identity = process_identity(os.getpid())
        variables = {**os.environ, "PATH": path_with_own_bin(), **environment}
        if identity is not None:
            variables[SUPERVISOR_VARIABLE] = identity
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                list(command),
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches us alone, and the group is ours to end
            )

    @property
    def pid(self) -> int:
        """Of the launcher, which is also the id of the group."""
        return self._process.pid

    def poll(self) -> int | None:
        """The launcher's exit code; None while it runs."""
        return self._process.poll()

    def end(self, grace_s: float = GRACE_S) -> None:
        """Ends every process of the group: first asks, then kills; returns when none is left."""
        for number, patience_s in ((signal.SIGTERM, grace_s), (signal.SIGKILL, 60.0)):
            if not self._signal(number) or self._wait_until_empty(patience_s):
                break
        self._process.wait()

    def _wait_until_empty(self, patience_s: float) -> bool:
        deadline = time.monotonic() + patience_s
        while time.monotonic() < deadline:
            self._process.poll()  # reaps the launcher: a dead child that nobody waited for still counts
            if not self._signal(0):
                return True
            time.sleep(_POLL_S)
        return False

    def _signal(self, number: int) -> bool:
        """Whether there was any process in the group to send it to."""
        try:
            os.killpg(self.pid, number)
        except ProcessLookupError:
            return False
        return True


def free_port() -> int:
    """A TCP port that is free now, for the ranks to meet at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
