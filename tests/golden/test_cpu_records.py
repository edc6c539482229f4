"""The estimator against the real engine: bytes of 75 runs on the CPU, measured by a program that shares no code."""

from pathlib import Path

import pytest

from vramplan.facts.device import Device, Node
from vramplan.facts.resolve import resolve_architecture
from vramplan.measure.compare import quantile
from vramplan.measure.record import Record, read_records, run_from_record_spec, steps_were_skipped
from vramplan.memory.estimate import UncoveredError, estimate
from vramplan.units import TIB

RECORDS = Path(__file__).with_name("cpu_records.jsonl")
"""Taken with torch 2.13.0, transformers 5.17.0 and deepspeed 0.19.8; profiler memory events of rank 0."""


def predict(record: Record):
    run, layout = run_from_record_spec(record.spec)
    node = Node(Device("CPU", "cpu", 16 * TIB, 16 * TIB), layout.world_size)
    return estimate(run, node, resolve_architecture(run), steps_skipped=steps_were_skipped(record))


def covered():
    for record in read_records(RECORDS):
        try:
            yield record, predict(record)
        except UncoveredError:
            continue


def test_peaks_of_covered_records():
    errors = [
        found.train_allocated_peak_bytes / record.measured.train_allocated_peak_bytes - 1 for record, found in covered()
    ]
    assert len(errors) >= 42
    absolute = sorted(abs(error) for error in errors)
    assert quantile(absolute, 0.5) <= 0.005
    assert quantile(absolute, 0.95) <= 0.02
    assert min(errors) >= -0.02


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_phases_of_the_lower_stages(stage):
    compared = 0
    for record, found in covered():
        if record.spec.zero.stage != stage:
            continue
        measured = {phase.phase: phase for phase in record.measured.phases}
        for phase in found.phases:
            assert phase.peak_bytes == pytest.approx(measured[phase.phase].allocated_peak_bytes, rel=0.01)
            assert phase.end_bytes == pytest.approx(measured[phase.phase].allocated_end_bytes, rel=0.01), record.spec.id
            compared += 1
    assert compared
