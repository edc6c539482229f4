"""Lines of JSON that a full disk cuts off spoil no other line, neither for who reads all nor for who follows."""

from __future__ import annotations

import resource
from contextlib import contextmanager

import pytest

from vramplan.measure.run_dir import append_event, read_events
from vramplan.supervise import attempts
from vramplan.supervise.attempts import Attempt
from vramplan.supervise.tail import Tail


@contextmanager
def files_no_larger_than(num_bytes: int):
    """As on a full disk: what still fits of a line is written, and the rest is an error."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_events_after_a_full_disk_can_be_read(tmp_path):
    path = tmp_path / "metrics.jsonl"
    append_event(path, "start")
    room = path.stat().st_size + 20
    with files_no_larger_than(room), pytest.raises(OSError, match="too large"):
        append_event(path, "step", step=1)
    assert path.stat().st_size == room
    tail = Tail(path)
    append_event(path, "resumed", step=0)
    append_event(path, "step", step=1)
    assert [event["event"] for event in read_events(path)] == ["start", "resumed", "step"]
    assert [event["event"] for event in tail.read()] == ["resumed", "step"]


def test_one_who_follows_all_along_passes_over_half_a_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path)
    path.write_text('{"event": "step", "st')
    assert tail.read() == []
    append_event(path, "note", text="x")
    assert [event["event"] for event in tail.read()] == ["note"]


def test_an_attempt_after_half_a_line_is_kept(tmp_path):
    path = tmp_path / "attempts.jsonl"
    attempts.append(path, Attempt("a", "", "finished"))
    path.write_text(path.read_text() + '{"plan": "b", "lay')
    attempts.append(path, Attempt("c", "", "finished"))
    assert [each.plan for each in attempts.read(path)] == ["a", "c"]
