"""A probe runs the longest batch by the real ranks before the real run, and what it meets corrects the plan."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from vramplan.measure.record import read_records
from vramplan.measure.run_dir import RunDir
from vramplan.search.plan import Plan

from support.training import ROOT, command, losses, processes_about, write_spec

pytestmark = [pytest.mark.ranks, pytest.mark.slow]  # the way through without a wall: test_snapshot.py


def test_a_plan_that_does_not_fit_is_found_out_and_replaced_before_the_run(finished_run, tiny_model, tmp_path):
    """Real: under a limit on data torch's allocator fails when the reduction bucket of 16 GB is asked for. The plan
    says otherwise because it was edited."""
    spec, run_dir = write_spec(tmp_path / "spec.yaml", tiny_model, 2), RunDir(tmp_path / "run")
    subprocess.run([sys.executable, "-m", "vramplan", "plan", spec, "-o", tmp_path], check=True, cwd=ROOT)
    plan = tmp_path / "plan.yaml"
    plan.write_text(plan.read_text().replace("reduce_bucket_size: 100000\n", "reduce_bucket_size: 4000000000\n"))
    limited = ["prlimit", f"--data={8 * 2**30}", *command(plan, "-o", run_dir.root, "--probe")]
    done = subprocess.run(limited, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    probe_dir = RunDir(run_dir.root / "probe")
    probed, ran = (_attempts(each) for each in (probe_dir, run_dir))
    assert [attempt["cause"] for attempt in probed][1:] == ["finished"]
    assert probed[0]["phase"].endswith("backward")
    assert [attempt["cause"] for attempt in ran] == ["finished"]
    assert probed[1]["plan"] == ran[0]["plan"] != probed[0]["plan"]
    assert Plan.load(run_dir.plan).run.zero.reduce_bucket_size < 4_000_000_000
    assert losses(run_dir.root) == pytest.approx(losses(finished_run(2, "full")), rel=1e-5)
    assert processes_about(str(run_dir.root)) == []
    _check_record(probe_dir)


def _attempts(run_dir: RunDir) -> list[dict]:
    return [json.loads(line) for line in run_dir.attempts.read_text().splitlines()]


def _check_record(probe_dir: RunDir) -> None:
    """What was measured is what the real run will meet: up to two micro-batches a step, evaluation and save, and
    nothing is left behind."""
    (record,) = read_records(probe_dir.record)
    plan = Plan.load(probe_dir.plan)
    last = min(2, plan.run.grad_accum_steps or 1)
    micros = [f"micro{micro}.{kind}" for micro in range(1, last + 1) for kind in ("forward", "backward")]
    step = [*micros, f"micro{last}.optimizer_step"]
    assert [reading.phase for reading in record.measured.phases] == [
        "model_load",
        "engine_init",
        *(f"step{number}.{phase}" for number in (1, 2) for phase in step),
        "evaluation",
        "save",
    ]
    assert not probe_dir.checkpoints.exists()
    predicted = {each.phase: each.peak_bytes for each in plan.prediction.phases}
    for reading in record.measured.phases[2:-2]:
        assert predicted[reading.phase] == pytest.approx(reading.allocated_peak_bytes, rel=0.01), reading.phase
