"""Jobs that are drawn: what is refused is not drawn, and a fault of the estimator is not taken for a refusal."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
JOB = json.loads((ROOT / "tests/golden/measured/cpu_draws.jsonl").read_text().splitlines()[0])["spec"]


@pytest.fixture(scope="module")
def draws() -> ModuleType:
    spec = importlib.util.spec_from_file_location("draws", ROOT / "benchmarks" / "draws.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_job_that_runs_is_possible_and_one_that_is_refused_is_not(draws):
    assert draws._is_possible(JOB, 2**40)
    assert not draws._is_possible({**JOB, "precision": "fp16"}, 2**40)  # no CPU without fp16
    assert not draws._is_possible({**JOB, "micro_batch_size": 0}, 2**40)  # not read


def test_a_fault_of_the_estimator_is_seen(draws, monkeypatch):
    def faulty(*_: object, **__: object) -> None:
        raise ValueError("zip() argument 2 is shorter than argument 1")

    monkeypatch.setattr(draws, "estimate", faulty)
    with pytest.raises(ValueError, match="zip"):
        draws._is_possible(JOB, 2**40)
