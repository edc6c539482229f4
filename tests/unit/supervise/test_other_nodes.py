"""Ranks of other nodes are told to end by a file in the run's directory; here they are real processes."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from vramplan.measure.run_dir import RunDir
from vramplan.supervise.other_nodes import end_other_nodes
from vramplan.supervise.watch import RankWatch, read_statuses
from vramplan.train.status import STOPPED_EXIT_CODE

# a rank in a process that has its own launcher (a shell), and says that it is of another node
RANK = """
import sys, time
from dataclasses import replace
from pathlib import Path
from vramplan.measure.run_dir import RunDir
from vramplan.train.status import RankStatus, start_guard
run_dir = RunDir(Path(sys.argv[1]))
status = RankStatus(run_dir.status_of(1), 1)
status.now = replace(status.now, node="another")
status.mark("step1.micro1.forward", 1, 1)
start_guard(status, run_dir.stop_of(29501))
print("on", flush=True)
time.sleep(60)
"""


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    (tmp_path / "ranks").mkdir()
    return RunDir(tmp_path)


@pytest.fixture
def rank(run_dir: RunDir):
    with subprocess.Popen([sys.executable, "-c", RANK, str(run_dir.root)], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"on\n"
        yield process
        process.kill()


def test_a_rank_elsewhere_ends_when_it_is_told_and_only_then(run_dir, rank):
    assert not end_other_nodes(run_dir, 29502, quiet_s=5.0, patience_s=2.0)  # those that met at another port
    assert rank.poll() is None
    assert end_other_nodes(run_dir, 29501, quiet_s=2.0)
    assert rank.wait(timeout=5) == STOPPED_EXIT_CODE
    began = time.monotonic()
    run_dir.status_of(1).write_text(run_dir.status_of(1).read_text().replace("step1.micro1.forward", "end"))
    assert end_other_nodes(run_dir, 29501)
    assert time.monotonic() - began < 1  # nobody is left to wait for


def test_a_rank_elsewhere_that_is_gone_is_not_dead_but_falls_silent(run_dir, rank):
    watch = RankWatch(run_dir, silent_after_s=0.5)
    rank.kill()
    rank.wait()
    assert not watch.look()
    time.sleep(1.0)
    trouble = watch.look()
    assert (trouble.dead, trouble.silent) == ((), (1,))
    assert [status["node"] for status in read_statuses(run_dir)] == ["another"]


def test_an_orphan_tells_the_others(run_dir):
    middle = subprocess.Popen(
        ["sh", "-c", f'"{sys.executable}" -c "$0" "$1"; exit $?', RANK, str(run_dir.root)], stdout=subprocess.PIPE
    )
    assert middle.stdout.readline() == b"on\n"
    middle.kill()
    middle.wait()
    deadline = time.monotonic() + 10
    while not run_dir.stop_of(29501).exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    middle.stdout.close()
