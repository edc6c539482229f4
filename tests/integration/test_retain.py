"""Methods against forgetting in real runs on two ranks: they pull, they keep what the ledger says, they combine."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from vramplan.measure.run_dir import RunDir

from support.training import losses, train, write_spec

pytestmark = pytest.mark.ranks


def moved(run_dir, model):
    """How far the weights are from where they began."""
    after, before = load_file(RunDir(run_dir).model / "model.safetensors"), load_file(model / "model.safetensors")
    return torch.sqrt(sum((after[name].float() - before[name].float()).square().sum() for name in after)).item()


@pytest.mark.slow
def test_springs_hold_weights_back_the_same_under_every_stage(finished_run, tiny_model, tmp_path):
    springs = {"ewc": {"data": "builtin:python-reference", "samples": 3, "weight": 0.5}, "l2sp": {"weight": 0.5}}
    found = {}
    for stage in (0, 3):
        spec = write_spec(tmp_path / f"{stage}.yaml", tiny_model, stage, retain=springs)
        done = train(spec, "-o", tmp_path / str(stage))
        assert done.returncode == 0, done.stderr
        found[stage] = losses(tmp_path / str(stage))
        assert moved(tmp_path / str(stage), tiny_model) < 0.8 * moved(finished_run(stage, "full"), tiny_model)
    assert found[3] == pytest.approx(found[0], rel=1e-4)


def test_interpolation_goes_back_a_share_of_the_way(finished_run, tiny_model, tmp_path):
    spec = write_spec(tmp_path / "spec.yaml", tiny_model, 0, retain={"interpolate": 0.25})
    done = train(spec, "-o", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert moved(tmp_path / "run", tiny_model) == pytest.approx(
        0.75 * moved(finished_run(0, "full"), tiny_model), rel=1e-3
    )
