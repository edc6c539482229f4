"""What several integration tests share: the tiny model, and finished runs of each stage and method."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

from support.tiny_model import save_tiny_model
from support.training import train, write_spec

FinishedRun = Callable[[int, str], Path]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def finished_run(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """The directory of an uninterrupted run with a stage and a method; each is run once and not to be changed."""
    base = tmp_path_factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "runs"  # one for all of pytest's workers
    root.mkdir(exist_ok=True)

    def run(stage: int, method: str) -> Path:
        run_dir = root / f"{method}-{stage}"
        finished_well = run_dir.with_suffix(".finished")
        with FileLock(f"{run_dir}.lock"):
            if not finished_well.exists():
                spec = write_spec(root / f"{method}{stage}.yaml", tiny_model, stage, method)
                finished = train(spec, "-o", run_dir)
                assert finished.returncode == 0, finished.stdout + finished.stderr
                finished_well.touch()
        return run_dir

    return run


@pytest.fixture
def copy_of_run(finished_run: FinishedRun, tmp_path: Path) -> FinishedRun:
    """A copy of a finished run, to damage and resume."""

    def copy(stage: int, method: str) -> Path:
        return Path(shutil.copytree(finished_run(stage, method), tmp_path / "run"))

    return copy
