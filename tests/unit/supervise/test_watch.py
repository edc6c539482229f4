"""The watcher sees markers, missing processes and ranks without a heartbeat, each by what the ranks really write."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from vramplan.measure.run_dir import RunDir
from vramplan.supervise.attempts import Attempt, append, read
from vramplan.supervise.classify import classify
from vramplan.supervise.evidence import collect
from vramplan.supervise.free_memory import free_bytes, wait_until_free
from vramplan.supervise.watch import RankWatch, Trouble
from vramplan.train.progress import tell
from vramplan.train.status import RankStatus, write_failure

BEATING = """
import sys, time
from pathlib import Path
from vramplan.train.status import RankStatus, start_guard
status = RankStatus(Path(sys.argv[1]), 1)
status.mark("step1.micro1.forward", 1, 1)
start_guard(status)
print("on", flush=True)
time.sleep(60)
"""


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    (tmp_path / "ranks").mkdir()
    return RunDir(tmp_path)


@pytest.fixture
def rank(run_dir: RunDir):
    command = [sys.executable, "-c", BEATING, str(run_dir.status_of(1))]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"on\n"
        yield process
        process.kill()


def look_until(watch: RankWatch, condition, patience_s: float = 15.0):
    deadline = time.monotonic() + patience_s
    while True:
        trouble = watch.look()
        if condition(trouble):
            return trouble
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_rank_that_lives_is_no_trouble_and_a_killed_one_is_dead_before_anyone_reaps_it(run_dir, rank):
    watch = RankWatch(run_dir, silent_after_s=60)
    assert not watch.look()
    rank.send_signal(signal.SIGKILL)
    assert look_until(watch, bool).dead == (1,)


def test_a_stopped_rank_is_silent_and_not_dead(run_dir, rank):
    watch = RankWatch(run_dir, silent_after_s=2.5)
    assert not watch.look()
    rank.send_signal(signal.SIGSTOP)
    trouble = look_until(watch, bool)
    assert (trouble.silent, trouble.dead) == ((1,), ())


@pytest.mark.parametrize("phase", ["data", "model_load", "evaluation", "save", "resume", "step1.micro1.forward"])
def test_ranks_that_stand_still_are_stuck_whatever_they_are_at(run_dir, phase):
    standing, waiting = (RankStatus(run_dir.status_of(number), number) for number in range(2))
    watch = RankWatch(run_dir, stuck_after_s=0.3)
    standing.mark(phase)
    waiting.mark(phase)
    for goes_on in (True, False):
        watch.look()
        time.sleep(0.5)
        if goes_on:
            tell()
        standing.beat()
        waiting.beat(at_work=goes_on)
        assert (watch.look().stuck_s is None) == goes_on


def test_one_rank_that_goes_on_is_enough(run_dir):
    slow, waiting = (RankStatus(run_dir.status_of(number), number) for number in range(2))
    watch = RankWatch(run_dir, stuck_after_s=0.3)
    watch.look()
    time.sleep(0.5)
    waiting.beat()
    slow.beat(at_work=True)
    assert not watch.look()


def test_the_rank_that_stood_still_first_is_where_the_run_hung(run_dir):
    waiting, standing = (RankStatus(run_dir.status_of(number), number) for number in range(2))
    standing.mark("model_load")
    watch = RankWatch(run_dir, stuck_after_s=0.3)
    watch.look()
    time.sleep(0.5)
    waiting.mark("engine_init")
    assert not watch.look()
    time.sleep(0.5)
    trouble = watch.look()
    assert trouble.stuck_rank == 1
    verdict = classify(collect(run_dir, None, trouble))
    assert str(verdict) == "the run hung in model_load"


def test_ranks_that_wait_for_each_other_at_their_end_are_stuck(run_dir):
    RankStatus(run_dir.status_of(0), 0).mark("end")
    watch = RankWatch(run_dir, stuck_after_s=0.3)
    assert not watch.look()
    assert look_until(watch, bool).stuck_s is not None


def test_a_launcher_that_starts_no_rank_is_stuck(run_dir):
    watch = RankWatch(run_dir, stuck_after_s=0.1, start_within_s=0.5)
    assert not watch.look()
    assert look_until(watch, bool).stuck_s > 0.5


SPINS = "while True: pass"
WRITES = "file = open(sys.argv[2], 'wb', buffering=0)\nwhile True: file.write(bytes(1 << 17)); time.sleep(0.2)"
OF_A_CHILD = "import subprocess; subprocess.run([sys.executable, '-c', sys.argv[3]])"
ALLOCATES = "import time\nkept = []\nwhile True: kept.append(bytearray(1 << 17)); time.sleep(0.2)"


@pytest.mark.parametrize(
    ("main_thread", "goes_on"), [(SPINS, False), (WRITES, True), (ALLOCATES, True), (OF_A_CHILD, True)]
)
def test_work_is_seen_in_a_call_that_tells_nothing_and_spinning_is_none(run_dir, tmp_path, main_thread, goes_on):
    """A rank in DeepSpeed's saving tells nothing until it is through; one in a collective on the CPU may spin."""
    script = BEATING.replace("time.sleep(60)", main_thread)
    command = [sys.executable, "-c", script, str(run_dir.status_of(1)), str(tmp_path / "file"), ALLOCATES]
    watch = RankWatch(run_dir, stuck_after_s=3.0)
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"on\n"
        try:
            if goes_on:
                deadline = time.monotonic() + 6.0
                while time.monotonic() < deadline:
                    assert not watch.look()
                    time.sleep(0.1)
            else:
                trouble = look_until(watch, bool)
                assert trouble.stuck_s is not None
                assert trouble.silent == ()
        finally:
            process.kill()


def test_a_rank_that_came_to_its_end_is_not_missed(run_dir):
    with subprocess.Popen(["true"]) as gone:
        gone.wait()
    status = RankStatus(run_dir.status_of(0), 0)
    status.mark("end")
    text = run_dir.status_of(0).read_text().replace(str(os.getpid()), str(gone.pid).ljust(len(str(os.getpid()))))
    run_dir.status_of(0).write_text(text)
    assert not RankWatch(run_dir).look()


def test_a_rank_that_hangs_after_its_last_step_is_silent(run_dir, rank):
    """It says that it is at its end, and a peer that waits for it would wait for half an hour."""
    text = run_dir.status_of(1).read_text().replace("step1.micro1.forward", "end")
    watch = RankWatch(run_dir, silent_after_s=2.5)
    rank.send_signal(signal.SIGSTOP)
    time.sleep(0.2)
    run_dir.status_of(1).write_text(text)
    assert not watch.look()
    assert look_until(watch, bool).silent == (1,)


def test_a_launcher_that_does_not_end_after_its_ranks_is_told(run_dir):
    with subprocess.Popen(["true"]) as gone:
        gone.wait()
    status = RankStatus(run_dir.status_of(0), 0)
    watch = RankWatch(run_dir, silent_after_s=0.5)
    status.now = replace(status.now, pid=gone.pid)
    status.mark("end")
    assert not watch.look()
    assert look_until(watch, bool) == Trouble(launcher_hangs=True)


def test_a_marker_is_trouble_and_names_what_was_worked_on(run_dir):
    status = RankStatus(run_dir.status_of(0), 0, plan="abc")
    status.remember_baseline()
    status.hold(((2, 8), (2, 8)), (5, 7))
    status.mark("step2.micro1.forward", 2, 1)
    text = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes."
    assert write_failure(run_dir.failure_of(0), status, RuntimeError(text)) == 86
    trouble = RankWatch(run_dir).look()
    from vramplan.measure.marker import Marker

    (path,) = trouble.markers
    found = Marker.read(path)
    assert (found.step, found.micro, found.samples, found.shapes) == (2, 1, (5, 7), ((2, 8), (2, 8)))
    assert (found.plan, found.exit_code, found.memory.requested) == ("abc", 86, 4096)
    assert found.memory.reserved >= 0
    assert found.memory.free > 0


def test_a_ledger_is_read_back_and_half_a_line_is_passed_over(tmp_path):
    path = tmp_path / "attempts.jsonl"
    one = Attempt(plan="a", layout="l", cause="saving", predicted_bytes=5, changes={"zero.stage": 3})
    append(path, one)
    append(path, Attempt(plan="b", layout="l", cause="finished"))
    with path.open("a") as file:
        file.write('{"plan": "c", "lay')
    found = read(path)
    assert found[0] == one
    assert [attempt.is_memory for attempt in found] == [True, False]


def test_memory_is_waited_for():
    readings = iter([(50, 10), (90, 10), (96, 10)])
    assert wait_until_free((100, 10), lambda: next(readings))
    assert next(readings, None) is None
    assert not wait_until_free((100,), lambda: (10,), patience_s=0.3)
    assert free_bytes()[0] > 0
