"""What a started command finds: the programs of this Python's environment, and its supervisor's identity."""

import sys
import time
from pathlib import Path

import pytest

from vramplan.forkserver import path_with_own_bin
from vramplan.supervise.child import Child


@pytest.fixture
def printed(tmp_path):
    """Runs a command as a child to its end and gives what it printed."""

    def run(command, environment):
        log = tmp_path / "logs" / "child.log"
        child = Child(command, environment, log)
        deadline = time.monotonic() + 20
        while child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        child.end()
        assert child.poll() == 0
        return log.read_text().strip()

    return run


def test_a_child_finds_the_programs_of_this_python_first(printed, monkeypatch):
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    own_bin = str(Path(sys.executable).parent)
    assert printed(["/bin/sh", "-c", 'echo "$PATH"'], {}) == f"{own_bin}:/usr/bin:/bin"


def test_the_environment_given_for_the_launch_wins(printed):
    assert printed(["/bin/sh", "-c", 'echo "$PATH"'], {"PATH": "/only/here"}) == "/only/here"


def test_without_a_path_the_systems_default_is_searched(monkeypatch):
    monkeypatch.delenv("PATH")
    assert path_with_own_bin().endswith(":/bin:/usr/bin")
