"""Files that a dying rank left half written do not hide why the run ended."""

import json
from pathlib import Path

import pytest

from vramplan.measure.run_dir import RunDir
from vramplan.supervise.failure import explain, first_failure
from vramplan.train.status import RankStatus, write_failure


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    found = RunDir(tmp_path)
    found.ranks.mkdir(parents=True)
    found.logs.mkdir(parents=True, exist_ok=True)
    return found


def _fail(run_dir: RunDir, rank: int, message: str) -> Path:
    status = RankStatus(run_dir.ranks / f"rank{rank}.status.json", rank)
    status.mark("backward", 2, 1)
    path = run_dir.ranks / f"rank{rank}.failure.json"
    write_failure(path, status, RuntimeError(message))
    return path


@pytest.mark.parametrize("kept", [0, 1, 40])
def test_half_a_marker_does_not_hide_the_other_ranks(run_dir: RunDir, kept: int) -> None:
    cut = _fail(run_dir, 0, "connection closed by peer")
    cut.write_text(cut.read_text()[:kept])
    _fail(run_dir, 1, "DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")
    failure = first_failure(run_dir)
    assert failure is not None
    assert failure.rank == 1
    assert failure.is_out_of_memory
    assert "rank 1 ran out of memory in backward" in str(explain(run_dir, 1))


def test_a_marker_without_its_keys_is_not_read(run_dir: RunDir) -> None:
    _fail(run_dir, 0, "x").write_text(json.dumps({"rank": 0}))
    assert first_failure(run_dir) is None


def test_an_empty_status_is_a_phase_unknown(run_dir: RunDir) -> None:
    (run_dir.ranks / "rank0.status.json").touch()
    assert "rank 0 in a phase unknown" in str(explain(run_dir, -9))
