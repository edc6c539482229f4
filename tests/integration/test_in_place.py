"""One rank that runs out of memory in a forward or backward takes the step anew, in the same process, exactly."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vramplan.supervise.child import free_port

from support.faulty import attempts_of, fault, samples_of, train_with
from support.tiny_model import save_tiny_model
from support.training import ROOT, events_of, losses, write_spec

pytestmark = pytest.mark.ranks

WALLS = ["0:forward", "0:backward", "2:forward", "2:backward", "0:python"]


@pytest.fixture(scope="module")
def runs(tiny_model, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("walls")
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [sys.executable, "-m", "support.wall_worker", root, tiny_model, "0", "2", *WALLS, "2:held"],
        cwd=ROOT / "tests",
        env=os.environ | alone | where | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return root


@pytest.mark.parametrize("wall", WALLS)
def test_the_step_is_taken_anew_exactly(runs, wall):
    met, free = runs / wall.replace(":", "-"), runs / wall[0]
    (halved,) = events_of(met, "halved")
    assert (halved["step"], halved["micro_batch_size"]) == (1, 2)
    assert halved["reason"] == "MemoryError()" if wall == "0:python" else "can't allocate memory" in halved["reason"]
    assert losses(met) == losses(free)
    assert sorted(losses(met)) == [1, 2, 3, 4]
    weights = "model/model.safetensors"
    assert (met / weights).read_bytes() == (free / weights).read_bytes()
    samples = [[event["samples"] for event in events_of(each, "step")] for each in (met, free)]
    assert samples[0] == samples[1]


def test_what_is_still_held_ends_the_process_with_what_it_met(runs):
    error = (runs / "2-held" / "error.txt").read_text()
    assert "can't allocate memory" in error  # so that it is told for what it is
    assert error.endswith("bytes of the failed pass are still held")
    assert events_of(runs / "2-held", "halved") == []
    assert sorted(losses(runs / "2-held")) == [1]


@pytest.mark.slow
def test_a_real_limit_is_met_twice_and_the_run_goes_on_in_the_same_process(tmp_path):
    """Logits of 4 sequences take 59 MB: these and their log-softmax do not fit into 75 MB, those of 2 do not with
    their gradient."""
    wide = save_tiny_model(tmp_path / "wide", vocab_size=32768)
    alone = {"micro_batch_size": 4, "hardware": {"gpu": "cpu", "gpus_per_node": 1}}
    spec = write_spec(tmp_path / "spec.yaml", wide, 2, **alone, training={"eval_micro_batch_size": 1})
    free, met = tmp_path / "free", tmp_path / "met"
    limit = fault(0, r"step3\.micro1\.forward", "data", more=75 * 10**6)
    for faults, run_dir in (([], free), ([limit], met)):
        done = train_with(faults, spec, run_dir)
        assert done.returncode == 0, done.stdout + done.stderr
    assert [(each["step"], each["micro_batch_size"]) for each in events_of(met, "halved")] == [(2, 2), (2, 1)]
    assert [each.cause for each in attempts_of(met)] == ["finished"]
    assert samples_of(met) == samples_of(free)
    assert losses(met) == pytest.approx(losses(free), rel=1e-5)
    ended = train_with([limit], spec, tmp_path / "ended", "--no-recover")
    assert ended.returncode == 3
    assert "ran out of memory in step3.micro1.forward" in ended.stderr
    assert events_of(tmp_path / "ended", "halved") == []
