from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

from vramplan.emit.launch import SUPERVISOR_VARIABLE, process_identity
from vramplan.errors import DataError
from vramplan.measure.marker import Marker
from vramplan.train.status import ORPHAN_EXIT_CODE, RankStatus, write_failure


def test_a_status_is_whole_json_at_every_moment_and_keeps_its_size(tmp_path):
    path = tmp_path / "ranks" / "rank1.status.json"
    status = RankStatus(path, 1)
    size = path.stat().st_size
    status.mark("step12.micro3.backward", 12, 3)
    read = json.loads(path.read_text())
    assert (read["rank"], read["phase"], read["step"], read["micro"], read["pid"]) == (
        1,
        "step12.micro3.backward",
        12,
        3,
        os.getpid(),
    )
    status.mark("save", 12)
    assert json.loads(path.read_text())["phase"] == "save"
    assert path.stat().st_size == size


def test_a_heartbeat_moves_the_time_only(tmp_path):
    status = RankStatus(tmp_path / "s.json", 0)
    before = json.loads((tmp_path / "s.json").read_text())
    time.sleep(0.01)
    status.beat()
    after = json.loads((tmp_path / "s.json").read_text())
    assert after["time"] > before["time"]
    assert {**after, "time": 0} == {**before, "time": 0}


def test_a_failure_tells_whose_fault_it_is(tmp_path):
    status = RankStatus(tmp_path / "s.json", 0)
    status.mark("data")
    assert write_failure(tmp_path / "f.json", status, DataError("row 3 is bad")) == 2
    read = json.loads((tmp_path / "f.json").read_text())
    assert (read["by_user"], read["message"], read["phase"]) == (True, "row 3 is bad", "data")
    full = OSError(28, "No space left on device", "metrics.jsonl")
    assert write_failure(tmp_path / "f.json", status, full) == 2
    read = json.loads((tmp_path / "f.json").read_text())
    assert (read["by_user"], read["message"]) == (
        True,
        "metrics.jsonl cannot be written (No space left on device): make room, then --resume goes on from the last "
        "checkpoint",
    )
    assert write_failure(tmp_path / "f.json", status, ValueError("x")) == 1
    read = json.loads((tmp_path / "f.json").read_text())
    assert (read["by_user"], read["kind"]) == (False, "ValueError")
    assert "ValueError: x" in read["traceback"]


GUARDED = """
import sys, time
from pathlib import Path
from vramplan.train.status import RankStatus, start_guard
start_guard(RankStatus(Path(sys.argv[1]), 0))
print("on", flush=True)
time.sleep(60)
"""


def test_a_rank_ends_with_its_supervisor(tmp_path):
    with subprocess.Popen(["sleep", "60"]) as supervisor:
        identity = process_identity(supervisor.pid)
        command = [sys.executable, "-c", GUARDED, str(tmp_path / "s.json")]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, env={**os.environ, SUPERVISOR_VARIABLE: identity}
        ) as rank:
            assert rank.stdout.readline() == b"on\n"
            time.sleep(1.5)
            assert rank.poll() is None  # the guard lets it live as long as the supervisor lives
            supervisor.send_signal(signal.SIGKILL)
            supervisor.wait()
            assert rank.wait(timeout=5) == ORPHAN_EXIT_CODE


def test_a_marker_says_whose_memory_ran_out(tmp_path):
    status = RankStatus(tmp_path / "s.json", 0)
    assert status.device == "cpu"
    status.device = "cuda"
    assert write_failure(tmp_path / "f.json", status, MemoryError()) == 86
    read = Marker.read(tmp_path / "f.json")
    assert read.is_of_host
    assert read.memory.allocated is None  # the host's figures
    status.device = "cpu"  # where tensors lie in the host's memory
    assert write_failure(tmp_path / "f.json", status, MemoryError()) == 86
    assert not Marker.read(tmp_path / "f.json").is_of_host
