"""Which phases of a run are measured, and what is kept of each."""

from __future__ import annotations

import pytest
import torch

from vramplan.train.phases import Phases
from vramplan.train.record import passed_moments
from vramplan.train.status import RankStatus

MIB = 2**20


@pytest.fixture
def phases(tmp_path):
    found = Phases(RankStatus(tmp_path / "status.json", 0), torch.device("cpu"))
    yield found
    found.stop_measuring()


def passes(phases, name, num_bytes):
    """A phase that has so many bytes at its highest, and keeps none."""
    with phases.phase(name):
        torch.empty(num_bytes, dtype=torch.uint8)


def peaks(phases):
    return {reading.phase: reading.allocated_peak_bytes for reading in phases.readings}


def test_steps_are_measured_until_told_and_what_comes_between_them_once(phases):
    passes(phases, "step1.micro1.forward", 2 * MIB)
    phases.stop_measuring_steps()
    assert not phases.measures_steps
    passes(phases, "evaluation", MIB)
    passes(phases, "evaluation", 3 * MIB)  # of another held-out set
    passes(phases, "step3.micro1.forward", 9 * MIB)
    passes(phases, "evaluation", 9 * MIB)
    passes(phases, "save", MIB)
    assert peaks(phases) == {"step1.micro1.forward": 2 * MIB, "evaluation": 3 * MIB, "save": MIB}


def test_what_was_alive_before_a_pause_counts_after_it(phases):
    with phases.phase("model_load"):
        weights = torch.empty(5 * MIB, dtype=torch.uint8)
    phases.stop_measuring_steps()
    passes(phases, "step3.micro1.forward", MIB)
    passes(phases, "save", 2 * MIB)
    assert peaks(phases) == {"model_load": 5 * MIB, "save": 7 * MIB}
    assert weights.numel() == 5 * MIB


def test_a_record_says_what_was_measured_besides_steps(phases):
    passes(phases, "evaluation", MIB)
    phases.evaluated("evaluation", (4, 100))
    phases.evaluated("evaluation", (3, 50))
    passes(phases, "save", MIB)
    phases.evaluated("save", (1, 64))
    found = passed_moments(phases.readings, phases.shapes)
    assert (found.evaluation.size, found.evaluation.length) == (4, 100)
    assert (found.pinned.size, found.pinned.length) == (1, 64)
    assert found.saved_after_evaluation
    assert not found.resumed
    assert not found.exported


def test_readings_are_counted_also_where_they_are_lower_than_what_is_kept(phases):
    """Ranks decide by the number whether a record is written anew, and so all do or none."""
    passes(phases, "evaluation", 3 * MIB)
    passes(phases, "evaluation", MIB)
    assert (phases.num_read, len(phases.readings)) == (2, 1)
    phases.stop_measuring()
    assert phases.num_read == 2
