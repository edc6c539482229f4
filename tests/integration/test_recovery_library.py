"""The drop-ins of ``vramplan.recovery`` in transformers' real Trainer on the CPU."""

from __future__ import annotations

import importlib.util
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


def _run(module: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        cwd=ROOT / "tests",
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> dict[str, dict[str, Any]]:
    root: Path = tmp_path_factory.mktemp("trainer")
    done = _run("support.trainer_worker", root, *TASKS)
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


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed")
def test_trl_s_trainer_trains_and_its_own_loss_is_said_not_to_be_counted(tmp_path):
    done = _run("support.trl_worker", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "trl.json").read_text())
    assert "TRL's fused head" in found["note"]
    assert (found["steps"], found["comparison"]) == (3, [])
