"""The drop-ins of ``vramplan.recovery`` in transformers' real Trainer on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support.training import ROOT

pytestmark = pytest.mark.ranks

TASKS = ["fit", "misfit", "unknown", "reference", "batch"]


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> dict[str, dict[str, Any]]:
    root: Path = tmp_path_factory.mktemp("trainer")
    done = subprocess.run(
        [sys.executable, "-m", "support.trainer_worker", root, *TASKS],
        cwd=ROOT / "tests",
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return {task: json.loads((root / f"{task}.json").read_text()) for task in TASKS}


def test_what_was_predicted_is_what_the_trainer_takes(told):
    """Within 1% at the peak: Trainer is not DeepSpeed's engine, whose optimizer step keeps a little more."""
    found = told["fit"]
    assert found["fits"]
    assert found["note"].startswith("fits: ")
    assert [each["phase"] for each in found["comparison"]] == [
        "step1.forward and backward",
        "step1.optimizer_step",
        "step2.forward and backward",
        "step2.optimizer_step",
    ]
    for each in found["comparison"]:
        within = 0.01 if each["phase"].endswith("backward") else 0.03
        assert each["predicted_bytes"] == pytest.approx(each["measured_bytes"], rel=within), each["phase"]
    assert found["written"] == found["comparison"]


def test_a_run_that_does_not_fit_does_not_begin(told):
    assert told["misfit"]["error"].startswith("does not fit: ")
    assert told["misfit"]["steps"] == 0


def test_a_run_that_is_not_covered_trains_and_says_so(told):
    assert "frozen parameters without adapters are not counted" in told["unknown"]["note"]
    assert told["unknown"]["steps"] == 3
    assert told["unknown"]["comparison"] == []


def test_a_smaller_batch_keeps_the_global_batch(told):
    """Real: under a limit on data torch's allocator fails with 16 sequences and not with fewer."""
    found = told["batch"]
    assert found["tried"][0] == [16, 1]
    assert len(found["tried"]) > 1
    assert all(size * accumulation == 16 for size, accumulation in found["tried"])
    assert found["losses"] == pytest.approx(told["reference"]["losses"], rel=1e-6)
