"""A rank that stands still while its heart beats: each attempt ends within its bound, whatever the rank was at."""

from __future__ import annotations

import pytest

from vramplan.supervise.classify import Cause

from support.faulty import EVERY_TIME, attempts_of, fault, samples_of, train_with
from support.training import losses, processes_about, write_spec

pytestmark = pytest.mark.ranks

STUCK_AFTER_S = 15
AN_ATTEMPT_S = 300.0
"""What one attempt may take here beside its bound: two ranks start in 10 s, and on busy cores in minutes."""


def test_ranks_that_stand_still_at_whatever_they_are_are_started_again(finished_run, tiny_model, tmp_path):
    spec, run_dir = write_spec(tmp_path / "spec.yaml", tiny_model, 2), tmp_path / "run"
    phases = [(1, "model_load"), (1, "save"), (0, "evaluation"), (0, "resume")]
    faults = [fault(rank, phase, "stand") for rank, phase in phases]
    bound_s = (len(phases) + 1) * (STUCK_AFTER_S + AN_ATTEMPT_S)
    done = train_with(faults, spec, run_dir, "--stuck-after", str(STUCK_AFTER_S), timeout_s=bound_s)
    assert done.returncode == 0, done.stdout + done.stderr
    attempts = attempts_of(run_dir)
    assert [each.cause for each in attempts] == [Cause.HANG.value] * len(phases) + ["finished"]
    assert [each.phase for each in attempts][:-1] == [phase for _, phase in phases]
    assert len({each.plan for each in attempts}) == 1
    assert "hung in model_load" in done.stdout
    assert losses(run_dir) == losses(finished_run(2, "full"))
    assert samples_of(run_dir) == samples_of(finished_run(2, "full"))
    assert processes_about(str(run_dir)) == []


@pytest.mark.slow
def test_a_rank_that_always_stands_still_ends_the_run_with_a_sentence(tiny_model, tmp_path):
    spec, run_dir = write_spec(tmp_path / "spec.yaml", tiny_model, 2), tmp_path / "run"
    always = fault(1, "engine_init", "stand", EVERY_TIME)
    done = train_with([always], spec, run_dir, "--stuck-after", str(STUCK_AFTER_S), timeout_s=4 * AN_ATTEMPT_S)
    assert done.returncode == 3, done.stdout + done.stderr
    assert "the run hung in engine_init" in done.stderr
    assert done.stderr.count("\n") == 1
    assert {each.cause for each in attempts_of(run_dir)} == {Cause.HANG.value}
    assert processes_about(str(run_dir)) == []
