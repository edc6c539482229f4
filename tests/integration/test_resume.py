"""Checkpoints: resuming is as if nothing had happened, and a damaged one is not used."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from vramplan.measure.run_dir import RunDir

from support.training import events_of, losses, train, write_spec

pytestmark = pytest.mark.ranks

LAST, MIDDLE = "step-00000006", "step-00000003"


def checkpoints(run_dir: Path) -> list[str]:
    return sorted(path.name for path in RunDir(run_dir).checkpoints.iterdir())


@pytest.mark.parametrize(
    ("stage", "method"),
    [
        pytest.param(0, "full", marks=pytest.mark.slow),
        pytest.param(3, "full", marks=pytest.mark.slow),
        (3, "lora"),
    ],
)
def test_resumed_equals_uninterrupted_bit_for_bit(finished_run, copy_of_run, stage, method):
    uninterrupted, run_dir = finished_run(stage, method), copy_of_run(stage, method)
    shutil.rmtree(RunDir(run_dir).checkpoints / LAST)
    for name in ("adapter", "model"):
        shutil.rmtree(run_dir / name, ignore_errors=True)
    done = train(run_dir, "--resume")
    assert done.returncode == 0, done.stderr
    assert "goes on after step 3" in done.stdout
    assert [event["step"] for event in events_of(run_dir, "step")] == [1, 2, 3, 4, 5, 6, 4, 5, 6]
    assert losses(run_dir) == losses(uninterrupted)
    weights = "model/model.safetensors" if method == "full" else "adapter/adapter_model.safetensors"
    assert (run_dir / weights).read_bytes() == (uninterrupted / weights).read_bytes()


@pytest.mark.parametrize(
    ("stage", "optimizer"),
    [
        (3, "adamw"),
        pytest.param(2, "muon", marks=pytest.mark.slow),  # which has an Adam for what is no matrix
    ],
)
def test_deepspeeds_own_adam_goes_on_bit_for_bit(tiny_model, tmp_path, stage, optimizer):
    training = {"max_steps": 10, "save_every": 2, "keep_checkpoints": 5}
    spec = write_spec(
        tmp_path / "spec.yaml", tiny_model, stage, optimizer={"kind": optimizer, "lr": 1e-2}, training=training
    )
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert train(spec, "-o", whole).returncode == 0
    shutil.copytree(whole, cut)
    for step in (4, 6, 8, 10):
        shutil.rmtree(RunDir(cut).checkpoints / f"step-{step:08}")
    shutil.rmtree(cut / "model")
    done = train(cut, "--resume")
    assert done.returncode == 0, done.stderr
    assert "goes on after step 2" in done.stdout
    assert losses(cut) == losses(whole)
    weights = "model/model.safetensors"
    assert (cut / weights).read_bytes() == (whole / weights).read_bytes()


def test_a_damaged_checkpoint_is_passed_over_and_what_follows_is_the_same_bit_for_bit(finished_run, copy_of_run):
    run_dir = copy_of_run(2, "full")
    shard = RunDir(run_dir).checkpoints / LAST / "deepspeed" / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    shutil.rmtree(RunDir(run_dir).model)
    done = train(run_dir, "--resume")
    assert done.returncode == 0, done.stderr
    assert f"checkpoint {LAST} is damaged" in done.stdout
    assert shard.name in done.stdout
    assert "goes on after step 3" in done.stdout
    assert losses(run_dir) == losses(finished_run(2, "full"))
    weights = "model/model.safetensors"
    assert (run_dir / weights).read_bytes() == (finished_run(2, "full") / weights).read_bytes()


def test_no_whole_checkpoint_is_one_sentence(copy_of_run):
    run_dir = copy_of_run(0, "full")
    for name in checkpoints(run_dir):
        (RunDir(run_dir).checkpoints / name / "state.json").unlink()
    done = train(run_dir, "--resume")
    assert done.returncode == 2
    assert done.stderr.startswith(f"vramplan: no whole checkpoint in {run_dir}")
    assert "state.json is missing" in done.stderr


@pytest.mark.slow
def test_a_finished_run_has_nothing_left_to_do(copy_of_run):
    run_dir = copy_of_run(0, "full")
    before = losses(run_dir)
    done = train(run_dir, "--resume")
    assert done.returncode == 0, done.stderr
    assert losses(run_dir) == before
    assert len(events_of(run_dir, "step")) == 6


def test_checkpoints_hold_no_frozen_weights_and_only_the_newest_are_kept(finished_run, tiny_model, tmp_path):
    spec = write_spec(
        tmp_path / "spec.yaml", tiny_model, 2, "lora", training={"save_every": 1, "keep_checkpoints": 2, "max_steps": 4}
    )
    assert train(spec, "-o", tmp_path / "run").returncode == 0
    assert checkpoints(tmp_path / "run") == ["step-00000003", "step-00000004"]
    import torch

    saved = torch.load(
        RunDir(tmp_path / "run").checkpoints / "step-00000004" / "deepspeed" / "mp_rank_00_model_states.pt",
        weights_only=False,
    )
    assert saved["module"]
    assert all("lora_" in name for name in saved["module"])


def test_a_checkpoint_of_another_run_is_refused(copy_of_run):
    run_dir = copy_of_run(0, "full")
    plan = RunDir(run_dir).plan
    plan.write_text(plan.read_text().replace("seed: 0", "seed: 1"))
    done = train(run_dir, "--resume")
    assert done.returncode == 2
    assert "was made with seed 0, this run has 1" in done.stderr


def test_a_run_directory_is_not_overwritten(finished_run):
    run_dir = finished_run(0, "full")
    done = train(run_dir, "-o", run_dir)
    assert done.returncode == 2
    assert "already holds a run" in done.stderr


def test_state_says_where_it_is(finished_run):
    state = json.loads((RunDir(finished_run(2, "full")).checkpoints / MIDDLE / "state.json").read_text())
    assert state["step"] == 3
    assert state["global_batch_size"] == 8
    assert state["layout"]["world_size"] == 2
