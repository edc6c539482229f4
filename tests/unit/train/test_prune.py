"""Which checkpoints are kept when another has been written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vramplan.train.checkpoint import _prune
from vramplan.train.manifest import MANIFEST


@pytest.fixture
def saved(tmp_path):
    """Writes checkpoints whose sizes are right."""

    def write(*steps: int) -> Path:
        for step in steps:
            path = tmp_path / f"step-{step:08d}"
            path.mkdir()
            (path / "shard").write_bytes(b"12345678")
            (path / MANIFEST).write_text(json.dumps({"shard": [8, 0]}))
        return path

    return write


def kept(directory: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in directory.glob("step-*"))


def test_the_newest_and_the_best_are_kept(saved, tmp_path):
    _prune(tmp_path, saved(1, 2, 3, 4), keep=2, keep_step=1)
    assert kept(tmp_path) == [1, 3, 4]


def test_a_checkpoint_that_is_cut_takes_no_others_place(saved, tmp_path):
    written = saved(1, 2, 3)
    (tmp_path / "step-00000002" / "shard").write_bytes(b"1234")
    _prune(tmp_path, written, keep=2)
    assert kept(tmp_path) == [1, 3]


def test_one_that_a_resume_passed_over_takes_no_others_place(saved, tmp_path):
    """Of the right size, with other bytes: the run went on from step 3 and has written step 4 now."""
    saved(3, 6)
    _prune(tmp_path, saved(4), keep=1)
    assert kept(tmp_path) == [4]
