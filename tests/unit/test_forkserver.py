"""Jobs of a fork server do not outlive its client."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
CLIENT = """
import sys, time
from pathlib import Path
from vramplan.forkserver import ForkServer
with ForkServer("support.sleeping_server") as server:
    server.submit({}, Path(sys.argv[1]))
    time.sleep(600)
"""


def test_a_job_ends_when_the_client_is_killed(tmp_path):
    out = tmp_path / "pid"
    path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    client = subprocess.Popen([sys.executable, "-c", CLIENT, str(out)], env={**os.environ, "PYTHONPATH": path})
    try:
        assert comes_true(out.exists)
    finally:
        client.kill()
        client.wait()
    job = Path("/proc") / out.read_text(encoding="utf-8")
    assert comes_true(lambda: not job.exists())


def comes_true(condition: Callable[[], bool]) -> bool:
    until = time.monotonic() + 20
    while time.monotonic() < until and not condition():
        time.sleep(0.02)
    return condition()
