"""However a run ends, it says why in a sentence and leaves no process behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vramplan.measure.run_dir import RunDir, read_events

from support.training import ROOT, command, events_of, processes_about, start, train, write_spec

pytestmark = pytest.mark.ranks

PATIENCE_S = 120.0
GONE_WITHIN_S = 30.0


def long_spec(tmp_path: Path, model: Path) -> Path:
    return write_spec(tmp_path / "spec.yaml", model, 2, training={"max_steps": 100_000, "save_every": 50})


def wait_until(condition, patience_s: float) -> None:
    deadline = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.2)


@pytest.fixture
def running(tiny_model, tmp_path):
    """A long run that is past its first steps, and its directory; ended at the latest with the test."""
    run_dir = tmp_path / "run"
    process = start(long_spec(tmp_path, tiny_model), "-o", run_dir, "--no-recover")
    try:
        wait_until(lambda: len(read_events(RunDir(run_dir).metrics)) > 6 or process.poll() is not None, PATIENCE_S)
        assert process.poll() is None, process.stdout.read()
        yield process, run_dir
    finally:
        process.kill()
        for pid in processes_about(str(run_dir)):
            os.kill(pid, signal.SIGKILL)


def ranks_of(run_dir: Path) -> list[int]:
    return [pid for pid in processes_about(str(run_dir)) if b"deepspeed.launcher" not in cmdline(pid)]


def cmdline(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def launchers_of(run_dir: Path) -> list[int]:
    return [pid for pid in processes_about(str(run_dir)) if b"deepspeed.launcher.runner" in cmdline(pid)]


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_an_interrupt_ends_every_process(running, number):
    process, run_dir = running
    process.send_signal(number)
    output, _ = process.communicate(timeout=GONE_WITHIN_S)
    assert process.returncode == 130
    assert "interrupted; all ranks are ended" in output
    assert "Traceback" not in output
    assert processes_about(str(run_dir)) == []


def test_a_killed_launcher_leaves_no_rank(running):
    process, run_dir = running
    (launcher,) = launchers_of(run_dir)
    os.kill(launcher, signal.SIGKILL)
    output, _ = process.communicate(timeout=GONE_WITHIN_S)
    assert process.returncode == 3
    assert "Traceback" not in output
    assert processes_about(str(run_dir)) == []


def test_a_killed_supervisor_leaves_no_rank(running):
    process, run_dir = running
    process.kill()
    process.wait()
    wait_until(lambda: processes_about(str(run_dir)) == [], GONE_WITHIN_S)


def test_a_killed_rank_is_said_and_the_checkpoint_is_whole(running):
    process, run_dir = running
    wait_until(lambda: events_of(run_dir, "checkpoint"), PATIENCE_S)
    victim = next(pid for pid in ranks_of(run_dir) if rank_of(pid) == 1)
    os.kill(victim, signal.SIGKILL)
    output, _ = process.communicate(timeout=GONE_WITHIN_S)
    assert process.returncode == 3
    assert "Traceback" not in output
    assert processes_about(str(run_dir)) == []
    steps = events_of(run_dir, "step")[-1]["step"]
    done = train(run_dir, "--resume", "--max-steps", str(steps + 2))
    assert done.returncode == 0, done.stderr
    assert "goes on after step" in done.stdout


def rank_of(pid: int) -> int:
    variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    found = [variable for variable in variables if variable.startswith(b"RANK=")]
    return int(found[0].removeprefix(b"RANK=")) if found else -1


def test_a_malformed_row_is_said_before_any_process_starts(tiny_model, tmp_path):
    data = tmp_path / "rows.jsonl"
    good = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
    data.write_text(good * 3 + '{"messages": [{"role": "user", "content": "a"}]}\n' + good)
    spec = write_spec(tmp_path / "spec.yaml", tiny_model, 2, data={"train": str(data)})
    began = time.monotonic()
    done = train(spec, "-o", tmp_path / "run")
    assert done.returncode == 2
    assert done.stderr == (
        f"vramplan: {data} line 4: 'messages' has no assistant turn, so there is nothing to learn from it\n"
    )
    assert time.monotonic() - began < 5
    assert not (tmp_path / "run" / "logs").exists()


def test_what_a_rank_finds_wrong_is_one_sentence(tiny_model, tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "%s", "completion": "b"}\n' % ("long " * 200) * 20)
    spec = write_spec(tmp_path / "spec.yaml", tiny_model, 2, data={"train": str(data)})
    done = train(spec, "-o", tmp_path / "run")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert f"{data} line 1: no token to learn lies within seq_len 112" in done.stderr


def test_a_loss_that_is_not_finite_stops_the_run(tiny_model, tmp_path):
    spec = write_spec(
        tmp_path / "spec.yaml",
        tiny_model,
        0,
        optimizer={"kind": "sgd", "lr": 1e30},
        training={"max_grad_norm": 0, "warmup_frac": 0, "save_every": 1},
    )
    done = train(spec, "-o", tmp_path / "run")
    assert done.returncode == 3
    found = re.search(r"the loss is nan on the run's first samples after the update of step (\d+) \(s", done.stderr)
    assert found is not None, done.stderr
    assert "builtin:arithmetic line" in done.stderr
    assert "the last checkpoint is from before it" in done.stderr
    saved = [path.name for path in RunDir(tmp_path / "run").checkpoints.glob("step-*")]
    assert max(saved) == f"step-{int(found[1]) - 1:08d}"


def test_out_of_memory_is_said_with_its_phase(tiny_model, tmp_path):
    """Real: under a limit on data torch's allocator fails when the reduction bucket of 16 GB is asked for. The plan
    says otherwise because it was edited."""
    spec, run_dir = write_spec(tmp_path / "spec.yaml", tiny_model, 2), tmp_path / "run"
    subprocess.run([sys.executable, "-m", "vramplan", "plan", spec, "-o", tmp_path], check=True, cwd=ROOT)
    plan = tmp_path / "plan.yaml"
    plan.write_text(plan.read_text().replace("reduce_bucket_size: 100000\n", "reduce_bucket_size: 4000000000\n"))
    limited = ["prlimit", f"--data={8 * 2**30}", *command(plan, "-o", run_dir, "--no-recover")]
    done = subprocess.run(limited, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 3
    assert re.search(r"rank \d ran out of memory in step1\.micro1\.backward: .*can't allocate memory", done.stderr)
    assert done.stderr.count("\n") == 1
    assert processes_about(str(run_dir)) == []


def test_a_directory_without_weights_is_one_sentence(tiny_model, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((tiny_model / "config.json").read_bytes())
    done = train(write_spec(tmp_path / "spec.yaml", bare, 0), "-o", tmp_path / "run")
    assert done.returncode == 2
    assert "has no weights as .safetensors" in done.stderr
