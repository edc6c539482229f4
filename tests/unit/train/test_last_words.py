"""A rank ends with its exit code, whatever it can still write."""

from __future__ import annotations

import subprocess
import sys

import pytest

from vramplan.measure.run_dir import RunDir
from vramplan.train import __main__ as rank
from vramplan.train.status import RankStatus


def test_a_log_on_a_full_disk_does_not_change_how_a_rank_ends(tmp_path):
    """Real: /dev/full takes no byte."""
    command = [sys.executable, "-m", "vramplan.train", tmp_path / "no-plan.yaml", tmp_path / "run"]
    with open("/dev/full", "w") as log:
        done = subprocess.run(command, stdout=log, stderr=log, check=False, timeout=60)
    assert done.returncode == 2
    assert RunDir(tmp_path / "run").failure_of(0).exists()


@pytest.mark.parametrize(("error", "code"), [(MemoryError(), 86), (ValueError("x"), 1)])
def test_a_marker_that_cannot_be_written_leaves_the_exit_code(monkeypatch, tmp_path, error, code):
    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(rank, "write_failure", fail)
    status = RankStatus(tmp_path / "rank0.status.json", 0)
    assert rank._last_words(tmp_path / "rank0.failure.json", status, error) == code
