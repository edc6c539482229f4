"""Processes after training: they are followed to their end, and ended where they hang."""

from __future__ import annotations

import sys
import time

import pytest

from vramplan.errors import RunFailedError
from vramplan.measure.run_dir import RunDir, read_events
from vramplan.supervise import afterwards
from vramplan.supervise.afterwards import AloneWatch, follow_afterwards
from vramplan.supervise.child import Child
from vramplan.supervise.tasks import evaluate_tasks

from support.training import processes_about


def waits_for_ever(tmp_path, monkeypatch):
    """A module that can be started by name and only waits, as for a server that does not answer."""
    (tmp_path / "waits_for_ever.py").write_text("import time\ntime.sleep(600)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return ["waits_for_ever", str(tmp_path)]


def test_a_process_that_does_nothing_is_ended(tmp_path, monkeypatch):
    module = waits_for_ever(tmp_path, monkeypatch)
    begun = time.monotonic()
    with pytest.raises(RunFailedError, match=r"did nothing for .* s and was ended"):
        follow_afterwards(RunDir(tmp_path), module, lambda _: None, tmp_path / "log", stuck_after_s=1.5)
    assert time.monotonic() - begun < 30
    assert processes_about(str(tmp_path)) == []


def test_benchmark_tasks_that_hang_are_a_note(tmp_path, monkeypatch):
    module = waits_for_ever(tmp_path, monkeypatch)
    monkeypatch.setattr("vramplan.supervise.tasks._MODULE", module[0])
    run_dir, heard = RunDir(tmp_path), []
    evaluate_tasks(run_dir, heard.append, stuck_after_s=1.5)
    assert [event["event"] for event in heard] == ["note"]
    assert "did nothing for" in heard[0]["text"]
    assert "did nothing for" in read_events(run_dir.metrics)[-1]["text"]


@pytest.mark.parametrize("work", ["while True: pass", "while True: bytearray(1 << 24)"])
def test_a_process_that_works_goes_on(tmp_path, monkeypatch, work):
    monkeypatch.setattr(afterwards, "_LOOK_EVERY_S", 0.3)
    child = Child([sys.executable, "-c", work], {}, tmp_path / "log")
    watch = AloneWatch(child.pid, stuck_after_s=0.5)
    try:
        for _ in range(20):
            time.sleep(0.1)
            assert not watch.look()
    finally:
        child.end()


def test_work_of_a_process_below_it_counts(tmp_path):
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', 'while True: pass', {str(tmp_path)!r}])"
    child = Child([sys.executable, "-c", code], {}, tmp_path / "log")
    watch = AloneWatch(child.pid, stuck_after_s=1.5)
    try:
        for _ in range(40):
            time.sleep(0.1)
            assert not watch.look()
    finally:
        child.end()
    assert processes_about(str(tmp_path)) == []
