"""Runs that meet real faults go on by themselves, exactly: more faults in ``benchmarks/recovery.py``."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from vramplan.measure.run_dir import RunDir
from vramplan.search.plan import Plan
from vramplan.supervise.classify import Cause

from support.cgroups import NoGroup, memory_group, oom_kills_of
from support.faulty import EVERY_TIME, MIB, attempts_of, fault, kill, samples_of, stop, train_with
from support.tiny_model import save_tiny_model
from support.training import events_of, losses, processes_about, train, write_spec

pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory) -> Path:
    """Its logits are large: at micro-batch 4 they are most of what a rank holds."""
    return save_tiny_model(tmp_path_factory.mktemp("models") / "wide", vocab_size=32768)


def test_two_recoveries_with_lower_plans_train_what_an_uninterrupted_run_trains(wide_model, tmp_path):
    """Micro-batch 4 needs 59 MB for its logits alone, and 2 half of that: neither is there when it is asked for."""
    spec = write_spec(tmp_path / "spec.yaml", wide_model, 2, micro_batch_size=4, grad_accum_steps=1)
    run_dir = tmp_path / "run"
    limits = [
        fault(1, r"step2\.micro1\.forward", "data", more=50 * 10**6),
        fault(1, r"step5\.micro1\.forward", "data", more=20 * 10**6),
    ]
    done = train_with(limits, spec, run_dir)
    assert done.returncode == 0, done.stdout + done.stderr
    first, second, last = attempts_of(run_dir)
    assert [each.cause for each in (first, second, last)] == [Cause.LOGITS.value, Cause.LOGITS.value, "finished"]
    assert [(each.rank, each.phase) for each in (first, second)] == [
        (1, "step2.micro1.forward"),
        (1, "step5.micro1.forward"),
    ]
    assert first.requested_bytes == 4 * 112 * 32768 * 4
    assert first.capacity_bytes < first.needed_bytes
    assert len({each.plan for each in (first, second, last)}) == 3
    assert second.last_saved_step == last.first_step == 3
    assert "ran out of memory in step2.micro1." in done.stdout
    assert "recovery: goes on after step 3 with micro_batch_size" in done.stdout

    plan = Plan.load(RunDir(run_dir).plan)
    assert plan.run.global_batch_size == 8
    assert plan.run.micro_batch_size < 4

    again = Path(shutil.copytree(run_dir, tmp_path / "again"))
    shutil.rmtree(RunDir(again).checkpoints / "step-00000006")
    alone = train(again, "--resume")
    assert alone.returncode == 0, alone.stderr
    assert losses(again) == losses(run_dir)
    assert samples_of(again) == samples_of(run_dir)
    assert sorted(losses(run_dir)) == [1, 2, 3, 4, 5, 6]
    weights = "model/model.safetensors"
    assert (again / weights).read_bytes() == (run_dir / weights).read_bytes()


@pytest.mark.slow
def test_a_killed_and_a_stopped_rank_are_started_again_as_they_were(finished_run, tiny_model, tmp_path):
    spec, run_dir = write_spec(tmp_path / "spec.yaml", tiny_model, 2), tmp_path / "run"
    faults = [kill(1, r"step2\.micro2\.backward"), stop(0, r"step5\.micro1\.forward")]
    done = train_with(faults, spec, run_dir, "--hang-after", "8")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [each.cause for each in attempts_of(run_dir)] == [Cause.KILLED.value, Cause.HANG.value, "finished"]
    assert [each.rank for each in attempts_of(run_dir)][:2] == [1, 0]
    assert len({each.plan for each in attempts_of(run_dir)}) == 1
    assert [event["steps_repeated"] for event in events_of(run_dir, "recovery")] == [1, 1]
    assert losses(run_dir) == losses(finished_run(2, "full"))
    assert samples_of(run_dir) == samples_of(finished_run(2, "full"))
    assert processes_about(str(run_dir)) == []


@pytest.mark.slow
def test_a_rank_that_the_kernel_kills_for_memory_goes_on_with_a_plan_that_needs_less(wide_model, tmp_path):
    spec, run_dir = write_spec(tmp_path / "spec.yaml", wide_model, 2, micro_batch_size=4, grad_accum_steps=1), "run"
    try:
        with memory_group(f"vramplan-test-{os.getpid()}") as group:
            limit = fault(1, r"step5\.micro1\.forward", "group", path=str(group), more=16 * MIB)
            done = train_with([limit], spec, tmp_path / run_dir)
            counted = oom_kills_of(group)
    except NoGroup as error:
        pytest.skip(f"no control group can be made here: {error}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert counted == 1
    first, last = attempts_of(tmp_path / run_dir)
    assert (first.cause, first.rank, first.phase) == (Cause.HOST_MEMORY.value, 1, "step5.micro1.forward")
    assert last.cause == "finished"
    assert last.plan != first.plan
    assert "killed for want of host memory in step5.micro1.forward" in done.stdout
    assert sorted(losses(tmp_path / run_dir)) == [1, 2, 3, 4, 5, 6]
    assert processes_about(str(tmp_path / run_dir)) == []


@pytest.mark.slow
def test_four_ranks_go_on_where_the_last_of_them_ran_out_of_memory(wide_model, tmp_path):
    four = {"micro_batch_size": 2, "grad_accum_steps": 1, "hardware": {"gpu": "cpu", "gpus_per_node": 4}}
    spec, run_dir = write_spec(tmp_path / "spec.yaml", wide_model, 2, **four), tmp_path / "run"
    done = train_with([fault(3, r"step5\.micro1\.forward", "data", more=20 * 10**6)], spec, run_dir)
    assert done.returncode == 0, done.stdout + done.stderr
    first, last = attempts_of(run_dir)
    assert (first.rank, first.phase, first.last_saved_step) == (3, "step5.micro1.forward", 3)
    assert (last.cause, last.first_step) == ("finished", 3)
    assert train(spec, "-o", tmp_path / "whole").returncode == 0
    assert losses(run_dir) == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
    assert samples_of(run_dir) == samples_of(tmp_path / "whole")
    assert processes_about(str(run_dir)) == []


def test_a_plan_that_can_never_fit_ends_with_its_reason(tiny_model, tmp_path):
    spec, run_dir = write_spec(tmp_path / "spec.yaml", tiny_model, 2), tmp_path / "run"
    done = train_with([fault(0, "model_load", "data", EVERY_TIME, more=2 * MIB)], spec, run_dir)
    assert done.returncode == 4, done.stdout + done.stderr
    assert "needs less there without changing the training" in done.stderr
    assert done.stderr.count("\n") == 1
    plans = [each.plan for each in attempts_of(run_dir)]
    assert len(plans) == len(set(plans))
    assert {each.cause for each in attempts_of(run_dir)} <= {Cause.LOAD.value, Cause.HOST_MEMORY.value}
    assert processes_about(str(run_dir)) == []
