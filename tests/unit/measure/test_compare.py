"""Order statistics of a comparison, against numpy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vramplan.measure.compare import compare_record, estimate_record, quantile, summarize
from vramplan.measure.record import Measured, read_records

FRACTIONS = st.floats(-0.9, 5, allow_nan=False)


@given(st.lists(FRACTIONS, min_size=1, max_size=50), st.sampled_from([0.0, 0.5, 0.95, 1.0]))
def test_quantiles_are_numpys(values: list[float], frac: float):
    assert quantile(sorted(values), frac) == pytest.approx(float(np.quantile(values, frac)))


@given(st.lists(FRACTIONS, min_size=1, max_size=50))
def test_a_summary_bounds_every_error(errors: list[float]):
    found = summarize(errors, len(errors) + 2)
    assert (found.num_records, found.num_covered) == (len(errors) + 2, len(errors))
    assert found.worst_under_frac is not None
    assert found.worst_over_frac is not None
    assert found.worst_under_frac <= 0 <= found.worst_over_frac
    assert all(found.worst_under_frac <= error <= found.worst_over_frac for error in errors)
    assert found.p95_abs_error_frac is not None
    assert found.median_abs_error_frac is not None
    assert 0 <= found.median_abs_error_frac <= found.p95_abs_error_frac


def test_of_a_run_of_one_step_the_peak_of_one_step_is_predicted():
    """States come to be in the first step, so the second is higher."""
    records = read_records(Path(__file__).parents[2] / "golden" / "cpu_records.jsonl")
    record = next(each for each in records if each.id == "CA000")
    whole = compare_record(record)
    first = tuple(phase for phase in record.measured.phases if not phase.phase.startswith("step2."))
    peak = max(phase.allocated_peak_bytes for phase in first if phase.is_step)
    assert peak < whole.measured_bytes
    measured = Measured("ok", first, train_allocated_peak_bytes=peak)
    found = compare_record(replace(record, measured=measured))
    assert found.predicted_bytes == pytest.approx(peak, rel=0.001)
    assert found.predicted_bytes < whole.predicted_bytes == estimate_record(record).train_allocated_peak_bytes


def test_nothing_covered_has_no_statistics():
    found = summarize([], 3)
    assert (found.num_records, found.num_covered, found.median_abs_error_frac) == (3, 0, None)
