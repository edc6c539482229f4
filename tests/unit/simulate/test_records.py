"""The simulator against the real engine: bytes of its runs on the CPU, measured by a program that shares no code."""

from pathlib import Path

import pytest

from vramplan.measure.compare import quantile
from vramplan.measure.record import read_records, steps_were_skipped, weights_were_halved
from vramplan.measure.record_spec import run_from_record_spec
from vramplan.simulate import record_request, simulate_jobs

RECORDS = Path(__file__).parents[2] / "golden" / "cpu_records.jsonl"
MASKED = RECORDS.parent / "measured" / "cpu_masks.jsonl"
TORCH = RECORDS.parent / "measured" / "cpu_torch.jsonl"
FOUR_BIT = RECORDS.parent / "measured" / "cpu_qlora.jsonl"
QUICK = ("CA009", "CA022", "CA028", "CA050", "EA011")
"""Stages 0, 2 and 3, checkpointing, adapters, accumulation, and families beyond llama's and qwen's."""


def simulated(records):
    by_id = {record.id: record for record in records}
    requests = [
        record_request(
            run_from_record_spec(record.spec)[0],
            key=record.id,
            skip_steps=steps_were_skipped(record),
            halved=weights_were_halved(record),
        )
        for record in records
    ]
    return [(by_id[key], result) for key, result in simulate_jobs(requests, parallel=2)]


def check(pairs, median, p95):
    errors = []
    for record, result in pairs:
        assert result.error is None, (record.id, result.error)
        errors.append(abs(result.train_allocated_peak_bytes / record.measured.train_allocated_peak_bytes - 1))
        found = {phase.phase: phase for phase in result.phases}
        for phase in record.measured.phases:
            peak, end = found[phase.phase].peak_bytes, found[phase.phase].end_bytes
            assert peak == pytest.approx(phase.allocated_peak_bytes, rel=0.002), (record.id, phase.phase)
            assert end == pytest.approx(phase.allocated_end_bytes, rel=0.002), (record.id, phase.phase)
        assert result.numel_total == record.measured.numel_total
        assert result.numel_trainable == record.measured.numel_trainable
    errors.sort()
    assert quantile(errors, 0.5) <= median
    assert quantile(errors, 0.95) <= p95


def test_records_of_every_kind():
    records = [record for record in read_records(RECORDS) if record.id in QUICK]
    assert len(records) == len(QUICK)
    check(simulated(records), median=0.0001, p95=0.001)


def test_plain_torch():
    """Alone and under DDP, with accumulation and checkpointing."""
    records = [record for record in read_records(TORCH) if record.id in ("T022", "T028")]
    assert len(records) == 2
    check(simulated(records), median=0.0001, p95=0.001)


def test_four_bit_weights():
    """bitsandbytes' own code, on fakes."""
    records = [record for record in read_records(FOUR_BIT) if record.id == "QL2"]
    records += [record for record in read_records(TORCH) if record.id == "T053"]
    assert len(records) == 2
    check(simulated(records), median=0.00001, p95=0.00001)


def test_masks_of_packed_and_padded_sequences():
    """Measured by `vramplan train` on two ranks, which loads its weights from a checkpoint and steps by itself."""
    records = {record.id: record for record in read_records(MASKED)}
    requests = [
        record_request(run_from_record_spec(record.spec)[0], key=record.id, masked=True, trained=True)
        for record in records.values()
    ]
    compared = 0
    for key, result in simulate_jobs(requests, parallel=2):
        assert result.error is None, (key, result.error)
        found = {phase.phase: phase for phase in result.phases}
        for phase in records[key].measured.phases:
            if phase.phase.endswith(("forward", "backward")):  # the rest is 0.8 MiB at most
                peak = found[phase.phase].peak_bytes
                assert peak == pytest.approx(phase.allocated_peak_bytes, rel=0.0005), (key, phase.phase)
                compared += 1
    assert compared == 2 * 2 * 2 * 2


@pytest.mark.slow
def test_every_record():
    records = read_records(RECORDS)
    assert len(records) == 75
    check(simulated(records), median=0.0001, p95=0.001)
