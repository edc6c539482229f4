"""Every recipe trains, with nothing of it changed but how much."""

from __future__ import annotations

import pytest

from vramplan.measure.run_dir import RunDir
from vramplan.spec.recipes import TASKS

from support.training import ROOT, events_of, losses, train

pytestmark = pytest.mark.ranks

LESS = {
    "seq_len": 112,
    "global_batch_size": 4,
    "data.eval_max": 4,
    "training.max_steps": 2,
    "training.eval_every": 2,
    "training.save_every": 2,
    "precision": "fp32",
    "optimizer.kind": "adamw_torch",
    "hardware.gpu": "cpu",
    "hardware.gpus_per_node": 1,
}


def run_recipe(task, run_dir, **fields):
    given = [f"--set={key}={value}" for key, value in {**LESS, **fields}.items()]
    return train(ROOT / "configs" / f"{task}.yaml", "-o", run_dir, *given, timeout_s=900)


def check(done, run_dir):
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(losses(run_dir)) == 2
    evaluated = {event["set"] for event in events_of(run_dir, "evaluation")}
    assert "held_out" in evaluated
    assert list(RunDir(run_dir).root.glob("*/*.safetensors"))


# the other two take a minute
@pytest.mark.parametrize(
    "task", [task if place < 2 else pytest.param(task, marks=pytest.mark.slow) for place, task in enumerate(TASKS)]
)
def test_a_recipe_trains_a_tiny_model(task, tiny_model, tmp_path):
    check(run_recipe(task, tmp_path / "run", model=tiny_model), tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_a_recipe_trains_its_own_model(task, tmp_path):
    check(run_recipe(task, tmp_path / "run", global_batch_size=2), tmp_path / "run")


@pytest.mark.slow
def test_set_changes_no_plan(finished_run):
    run_dir = finished_run(0, "full")
    done = train(run_dir, "--resume", "--set", "seq_len=64")
    assert done.returncode == 2
    assert "is a plan, and --set changes a spec" in done.stderr


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"data.eval_sets": "{general: /nowhere/x.jsonl}"}, "data.eval_sets.general: /nowhere/x.jsonl: there is no"),
        ({"retain.ewc": "{data: 'builtin:nonsense'}"}, "retain.ewc.data: unknown built-in data set 'builtin:nonsense'"),
        (
            {"training.best_on": "heldout"},
            "training.best_on is 'heldout', but the held-out sets are held_out, replay; ",
        ),
        ({"retain.early_stop": "{set: general}"}, "retain.early_stop.set is 'general', but the held-out sets are"),
    ],
    ids=str,
)
def test_what_is_not_there_is_said_before_launch(fields, said, tiny_model, tmp_path):
    done = run_recipe("sft-chat", tmp_path / "run", model=tiny_model, **fields)
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()
