"""Curves in trackers: each is started, shown points, resumed, and none can end a run."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from vramplan.errors import SpecError
from vramplan.measure.run_dir import RunDir, read_events
from vramplan.search.plan import Plan
from vramplan.spec.load import run_from_mapping
from vramplan.supervise.supervisor import check_before_launch
from vramplan.train.metrics import Metrics
from vramplan.train.trackers import flattened

CPU = torch.device("cpu")


def asked(*trackers):
    return run_from_mapping({"model": "HuggingFaceTB/SmolLM2-135M-Instruct", "training": {"trackers": trackers}})


def write_two_points(run, run_dir):
    metrics = Metrics(run, run_dir, 0, CPU)
    metrics.scalars(1, train__loss=2.5, train__grad_norm=None)
    metrics.scalars(2, train__loss=1.5)
    metrics.event("end", step=2)
    metrics.close()


def test_tensorboard_has_the_points(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write_two_points(asked("tensorboard"), RunDir(tmp_path))
    board = EventAccumulator(str(RunDir(tmp_path).tensorboard)).Reload()
    assert [(point.step, point.value) for point in board.Scalars("train/loss")] == [(1, 2.5), (2, 1.5)]
    assert board.Tags()["scalars"] == ["train/loss"]


def test_metrics_are_written_without_any_tracker(tmp_path):
    write_two_points(asked(), RunDir(tmp_path))
    assert [event["event"] for event in read_events(RunDir(tmp_path).metrics)] == ["end"]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_other_ranks_write_nothing(tmp_path):
    metrics = Metrics(asked("tensorboard"), RunDir(tmp_path), 1, CPU)
    metrics.scalars(1, train__loss=2.5)
    metrics.event("end", step=1)
    metrics.close()
    assert list(tmp_path.iterdir()) == []


def test_wandb_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    write_two_points(asked("wandb"), RunDir(tmp_path))
    assert list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))


def test_wandb_without_a_login_is_one_sentence(tmp_path, monkeypatch):
    pytest.importorskip("wandb").teardown()  # it keeps the mode that it first met
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_API_KEY", "")
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    with pytest.raises(SpecError, match=r"training\.trackers: wandb cannot be started .*wandb login"):
        Metrics(asked("wandb"), RunDir(tmp_path), 0, CPU)


def test_one_that_cannot_be_imported_is_to_be_installed_anew(tmp_path, monkeypatch):
    def broken(*_):
        raise ImportError("cannot import name 'service' from 'google.protobuf'")

    monkeypatch.setattr("vramplan.train.trackers._made", broken)
    with pytest.raises(SpecError, match=r"mlflow cannot be started \(cannot import .*\): pip install --upgrade mlflow"):
        Metrics(asked("mlflow"), RunDir(tmp_path), 0, CPU)


def test_mlflow_goes_on_in_the_same_run(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("alembic")  # and with it sqlalchemy: mlflow-skinny brings neither
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    run_dir = RunDir(tmp_path / "run")
    run_dir.root.mkdir()
    write_two_points(asked("mlflow"), run_dir)
    write_two_points(asked("mlflow"), run_dir)
    (found,) = mlflow.search_runs(experiment_names=["vramplan"], output_format="list")
    assert found.data.metrics["train/loss"] == 1.5
    assert found.data.params["model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_a_tracker_that_fails_is_let_go_with_a_note(tmp_path):
    run_dir = RunDir(tmp_path)
    metrics = Metrics(asked("tensorboard"), run_dir, 0, CPU)
    metrics.scalars(1, train__loss=2.5)
    (tracker,) = metrics._trackers
    tracker.writer.close()
    tracker.writer = None
    metrics.scalars(2, train__loss=1.5)
    metrics.scalars(3, train__loss=1.5)
    metrics.close()
    (note,) = read_events(run_dir.metrics)
    assert note["text"].startswith("tensorboard takes no more points from step 2 on")


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_one_that_is_not_installed_is_said_before_launch(name, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda asked, *rest: None if asked == name else found(asked, *rest)
    )
    plan = object.__new__(Plan)
    object.__setattr__(plan, "run", asked(name))
    with pytest.raises(SpecError, match=f"names {name}, which is not installed: pip install {name}, or drop it"):
        check_before_launch(plan)


def test_settings_are_flat():
    fields = {"a": {"b": 1, "c": {"d": "x"}}, "e": [1, 2], "f": None, "g": True}
    assert dict(flattened(fields)) == {"a.b": 1, "a.c.d": "x", "e": "[1, 2]", "f": "None", "g": True}
