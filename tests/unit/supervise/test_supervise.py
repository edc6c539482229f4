"""The supervisor's parts, on small processes that behave badly."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

from vramplan.emit.launch import SUPERVISOR_VARIABLE
from vramplan.facts.host import node_identity
from vramplan.measure.run_dir import RunDir, append_event, read_events, write_json
from vramplan.supervise.child import Child, free_port
from vramplan.supervise.failure import explain, first_failure
from vramplan.supervise.supervisor import follow
from vramplan.supervise.tail import Tail
from vramplan.supervise.watch import RankWatch

from support.training import processes_about

STUBBORN = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.fork() == 0:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("on", flush=True)
time.sleep(600)
"""


def python(code: str, *arguments: str) -> list[str]:
    return [sys.executable, "-c", code, *arguments]


def wait_for(condition, patience_s: float = 10.0) -> None:
    deadline = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_group_that_ignores_sigterm_is_killed_whole(tmp_path):
    log = tmp_path / "logs" / "log"
    child = Child(python(STUBBORN, str(tmp_path)), {}, log)
    wait_for(lambda: log.read_text().count("on") == 2)
    assert len(processes_about(str(tmp_path))) == 2
    child.end(grace_s=0.2)
    assert processes_about(str(tmp_path)) == []
    assert child.poll() == -signal.SIGKILL


def test_a_leader_that_is_gone_does_not_hide_its_group(tmp_path):
    code = "import os, time\nif os.fork() == 0: time.sleep(600)"
    child = Child(python(code, str(tmp_path)), {}, tmp_path / "log")
    wait_for(lambda: child.poll() == 0)
    assert len(processes_about(str(tmp_path))) == 1
    child.end(grace_s=2.0)
    assert processes_about(str(tmp_path)) == []


def test_a_child_gets_its_variables_and_its_supervisors_name(tmp_path):
    log = tmp_path / "log"
    code = f"import os; print(os.environ['A'], os.environ['{SUPERVISOR_VARIABLE}'])"
    child = Child(python(code), {"A": "b"}, log)
    wait_for(lambda: child.poll() is not None)
    child.end()
    import os

    assert log.read_text().split()[0] == "b"
    assert log.read_text().split()[1].startswith(f"{os.getpid()}:")


def test_a_finished_run_does_not_wait_for_a_launcher_that_hangs(tmp_path):
    run_dir = RunDir(tmp_path)
    run_dir.ranks.mkdir()
    with subprocess.Popen(["true"]) as gone:
        gone.wait()
    status = {"rank": 0, "pid": gone.pid, "phase": "end", "time": 1.0, "node": node_identity()}
    run_dir.status_of(0).write_text(json.dumps(status))
    child = Child(python("import time; time.sleep(600)", str(tmp_path)), {}, tmp_path / "log")
    tail, watch = Tail(run_dir.metrics), RankWatch(run_dir, silent_after_s=0.3)
    append_event(run_dir.metrics, "end")
    try:
        assert follow(child, tail, lambda _: None, watch) is None
    finally:
        child.end()
    assert processes_about(str(tmp_path)) == []


def test_ports_can_be_bound():
    assert 1024 <= free_port() <= 65535


def test_a_tail_gives_whole_lines_once_and_nothing_from_before(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert Tail(path).read() == []
    append_event(path, "old")
    tail = Tail(path)
    append_event(path, "step", step=1)
    with path.open("a") as file:
        file.write('{"event": "st')
    assert [event["event"] for event in tail.read()] == ["step"]
    assert tail.read() == []
    with path.open("a") as file:
        file.write('ep", "step": 2}\n')
    assert [event["step"] for event in tail.read()] == [2]
    assert [event["event"] for event in read_events(path)] == ["old", "step", "step"]


def failed(run_dir: RunDir, rank: int, when: float, **fields) -> None:
    run_dir.ranks.mkdir(parents=True, exist_ok=True)
    base = {"rank": rank, "phase": "step3.micro1.backward", "kind": "RuntimeError", "message": "boom\nmore"}
    write_json(run_dir.failure_of(rank), {**base, "by_user": False, "exit_code": 1, "time": when, **fields})


def test_the_first_failure_is_the_cause(tmp_path):
    run_dir = RunDir(tmp_path)
    assert first_failure(run_dir) is None
    failed(run_dir, 0, 20.0, message="Connection closed by peer")
    failed(run_dir, 1, 10.0)
    error = explain(run_dir, 1)
    assert str(error).startswith("rank 1 failed in step3.micro1.backward: RuntimeError: boom (log: ")
    assert error.exit_code == 3


def test_a_sentence_for_the_user_stands_as_it_is(tmp_path):
    run_dir = RunDir(tmp_path)
    failed(run_dir, 0, 10.0)
    failed(run_dir, 1, 20.0, message="row 3 is bad", by_user=True, exit_code=2)
    error = explain(run_dir, 1)
    assert str(error) == "row 3 is bad"
    assert error.exit_code == 2


def test_silence_is_explained_by_where_the_ranks_were(tmp_path):
    run_dir = RunDir(tmp_path)
    run_dir.logs.mkdir()
    (run_dir.logs / "launcher.log").write_text("first\nusage: deepspeed\n\nerror: no such option\n")
    assert "before any rank started: first | usage: deepspeed | error: no such option" in str(explain(run_dir, 2))
    run_dir.ranks.mkdir()
    run_dir.status_of(0).write_text(json.dumps({"phase": "save"}))
    assert "was ended from outside (launcher's code 247; rank 0 in save)" in str(explain(run_dir, 247))
