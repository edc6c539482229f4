"""Benchmark tasks after training: what is asked, what is refused before launch, and what a failure leaves as it was."""

from __future__ import annotations

import importlib.util

import pytest
import yaml

from vramplan.errors import SpecError
from vramplan.measure.run_dir import RunDir, read_events
from vramplan.search.plan import Plan, plan_id
from vramplan.spec.load import run_from_mapping
from vramplan.supervise import tasks
from vramplan.supervise.supervisor import check_before_launch
from vramplan.supervise.tasks import check_tasks, evaluate_tasks
from vramplan.train.card import model_card
from vramplan.train.harness import scores_of

FOUND = {  # the keys that lm_eval 0.4.13 gives: evaluator_utils.py, _compute_task_aggregations
    "results": {
        "sums": {"name": "sums", "alias": "sums", "sample_len": 4, "acc,none": 0.75, "acc_stderr,none": 0.25},
        "maths": {"exact_match,flexible": 0.5, "exact_match_stderr,flexible": "N/A", "exact_match,strict": 0.25},
    },
    "n-samples": {"sums": {"original": 10, "effective": 4}},
}


def asked(**fields):
    return run_from_mapping({"model": "some/base", "training": {"lm_eval": {"tasks": ["sums"], **fields}}})


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"tasks": []}, r"training\.lm_eval\.tasks is "),
        ({"limit": 0}, r"training\.lm_eval\.limit is 0 but must be more than 0"),
        ({"num_fewshots": 2}, "unknown key 'num_fewshots' in training.lm_eval; did you mean num_fewshot"),
    ],
    ids=str,
)
def test_a_bad_field_is_said(fields, said):
    with pytest.raises(SpecError, match=said):
        asked(**fields)


def test_tasks_do_not_make_another_plan():
    assert plan_id(asked()) == plan_id(run_from_mapping({"model": "some/base"}))


def test_lm_eval_that_is_not_installed_is_said_before_launch(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "lm_eval" else found(name, *rest)
    )
    plan = object.__new__(Plan)
    object.__setattr__(plan, "run", asked())
    with pytest.raises(SpecError, match=r"training\.lm_eval needs lm-eval: pip install 'vramplan\[eval\]'"):
        check_before_launch(plan)


def test_a_directory_of_tasks_that_is_not_there_is_said():
    with pytest.raises(SpecError, match=r"training\.lm_eval\.include_path is '/not/there', which is no directory"):
        check_tasks(asked(include_path="/not/there"))


@pytest.mark.parametrize(
    ("code", "reason"),
    [("raise OSError('no room')", "OSError: no room"), ("import os; os.kill(os.getpid(), 9)", "signal 9")],
    ids=["error", "killed"],
)
def test_a_failed_evaluation_is_a_note_and_no_more(code, reason, tmp_path, monkeypatch):
    (tmp_path / "fails.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(tasks, "_MODULE", "fails")
    heard = []
    evaluate_tasks(RunDir(tmp_path), heard.append)
    (event,) = read_events(RunDir(tmp_path).metrics)
    assert event["text"] == heard[0]["text"]
    assert event["text"].startswith(f"training.lm_eval gave no scores ({reason}; log: ")


def test_scores_stand_in_the_card_the_last_of_each_task():
    sums, maths = scores_of(FOUND)
    assert sums == {"task": "sums", "scores": {"acc": 0.75}, "stderrs": {"acc": 0.25}, "num_examples": 4}
    assert maths["scores"] == {"exact_match,flexible": 0.5, "exact_match,strict": 0.25}
    assert maths["stderrs"] == {}
    old = {**sums, "scores": {"acc": 0.0}}
    events = [{"event": "lm_eval", "version": "0.4.13", **each} for each in (old, sums, maths)]
    card = model_card(asked(), events, "some/base")
    assert "## Tasks (lm_eval 0.4.13)" in card
    assert "| sums | 4 | acc | 0.7500 | 0.2500 |\n| maths |  | exact_match,flexible | 0.5000 |  |" in card
    assert yaml.safe_load(card.split("```")[1].removeprefix("yaml\n"))["training"]["lm_eval"] == {"tasks": ["sums"]}
