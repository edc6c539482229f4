"""Ten records of the real engine, measured once more."""

import json
from pathlib import Path

import pytest

from vramplan.measure.bench import run_jobs
from vramplan.measure.record import read_jobs, read_records

RECORDS = Path(__file__).with_name("cpu_records.jsonl")
AGAIN = ("CA001", "CA010", "CA015", "CA023", "CA028", "CA030", "CA039", "CA045", "CA047", "CA049")
"""Every stage, checkpointing, adapters and small buckets, the quickest of each."""


@pytest.mark.slow
@pytest.mark.ranks
def test_bench_run_measures_the_same_bytes(tmp_path):
    before = {record.id: record for record in read_records(RECORDS) if record.id in AGAIN}
    jobs = [job for job in read_jobs(RECORDS) if job.id in AGAIN]
    assert len(jobs) == len(AGAIN)
    again = list(run_jobs(jobs, tmp_path / "again.jsonl"))
    for record in again:
        old, new = before[record.id].measured, record.measured
        assert (new.outcome, new.error) == ("ok", None)
        assert [phase.phase for phase in new.phases] == [phase.phase for phase in old.phases]
        for found, phase in zip(new.phases, old.phases, strict=True):
            where = (record.id, phase.phase)
            assert found.allocated_peak_bytes == pytest.approx(phase.allocated_peak_bytes, rel=0.001), where
            assert found.allocated_end_bytes == pytest.approx(phase.allocated_end_bytes, rel=0.001), where
        assert new.seconds_per_step
        assert new.host_rss_peak_bytes
    lines = (tmp_path / "again.jsonl").read_text(encoding="utf-8").splitlines()
    assert {json.loads(line)["id"] for line in lines} == set(AGAIN)
