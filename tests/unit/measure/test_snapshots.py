"""Snapshots outlive the run's processes, end with the run, and are lost only if a checkpoint is as new."""

from __future__ import annotations

from pathlib import Path

import pytest

from vramplan.measure.run_dir import RunDir
from vramplan.measure.snapshots import claim, has_saved_state, put_away, remove_forgotten, snapshots_of


@pytest.fixture
def memory(tmp_path) -> Path:
    (tmp_path / "shm").mkdir()
    return tmp_path / "shm"


@pytest.fixture
def run_dir(tmp_path) -> RunDir:
    made = RunDir(tmp_path / "run")
    made.checkpoints.mkdir(parents=True)
    return made


def add(directory: Path, step: int) -> Path:
    path = directory / f"step-{step:08d}"
    (path / "deepspeed").mkdir(parents=True)
    (path / "deepspeed" / "shard.pt").write_bytes(b"state" * step)
    return path


def test_the_newest_snapshot_becomes_a_checkpoint(run_dir, memory):
    directory = claim(run_dir, memory)
    add(run_dir.checkpoints, 3)
    add(directory, 5)
    add(directory, 7)
    said = put_away(run_dir, memory)
    assert said == f"the snapshot of step-00000007 was moved to {run_dir.checkpoints}"
    assert (run_dir.checkpoints / "step-00000007" / "deepspeed" / "shard.pt").read_bytes() == b"state" * 7
    assert sorted(path.name for path in run_dir.checkpoints.iterdir()) == ["step-00000003", "step-00000007"]
    assert not directory.exists()


def test_an_old_snapshot_is_dropped_without_a_word(run_dir, memory):
    directory = claim(run_dir, memory)
    add(directory, 7)
    add(run_dir.checkpoints, 7)
    assert put_away(run_dir, memory) is None
    assert not directory.exists()
    assert put_away(run_dir, memory) is None


def test_a_snapshot_that_the_disk_does_not_take_stays(run_dir, memory):
    directory = claim(run_dir, memory)
    kept = add(directory, 7)
    run_dir.checkpoints.rmdir()
    run_dir.checkpoints.write_text("a file where the directory should be")
    said = put_away(run_dir, memory)
    assert said is not None
    assert said.startswith(f"the snapshot {kept} is newer than every checkpoint but cannot be moved there")
    assert kept.exists()


def test_only_what_belongs_to_nobody_is_forgotten(run_dir, memory, tmp_path):
    mine, gone = claim(run_dir, memory), claim(RunDir(tmp_path / "gone"), memory)
    add(mine, 1)
    add(gone, 1)
    (memory / "another-program").mkdir()
    remove_forgotten(memory)
    assert mine.exists()
    assert not gone.exists()
    assert (memory / "another-program").exists()


def test_each_run_directory_has_its_own(tmp_path, memory):
    assert snapshots_of(RunDir(tmp_path / "a"), memory) != snapshots_of(RunDir(tmp_path / "b"), memory)
    assert snapshots_of(RunDir(tmp_path / "a" / ".." / "b"), memory) == snapshots_of(RunDir(tmp_path / "b"), memory)


def test_either_is_something_to_go_on_from(run_dir, memory):
    assert not has_saved_state(run_dir, memory)
    add(claim(run_dir, memory), 2)
    assert has_saved_state(run_dir, memory)
