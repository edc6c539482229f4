"""A record's spec whose fields cannot stand together is one sentence with the job's name."""

import json
from pathlib import Path

import pytest

from vramplan.errors import SpecError
from vramplan.measure.record import JobSpec, read_jobs, read_records, steps_were_skipped, weights_were_halved
from vramplan.measure.record_spec import run_from_record_spec

GOLDEN = Path(__file__).resolve().parents[2] / "golden"
RECORDS = GOLDEN / "measured/cpu_torch.jsonl"


def test_plain_torch_with_a_zero_stage():
    with RECORDS.open(encoding="utf-8") as lines:
        spec = json.loads(next(lines))["spec"]
    with pytest.raises(SpecError) as raised:
        run_from_record_spec(JobSpec.model_validate({**spec, "id": "X", "zero": {"stage": 2}}))
    assert str(raised.value) == (
        "job X: engine torch partitions nothing, but zero.stage is 2: leave it out, or use engine deepspeed"
    )


def test_a_record_is_run_again_with_its_steps_discarded_where_they_were():
    records, jobs = read_records(GOLDEN / "cpu_records.jsonl"), read_jobs(GOLDEN / "cpu_records.jsonl")
    discarded = {record.id for record in records if steps_were_skipped(record)}
    assert 0 < len(discarded) < len(records)
    assert {job.id for job in jobs if job.undefined_weights} == discarded


def test_a_record_is_run_again_with_halved_weights_where_they_were():
    records, jobs = read_records(GOLDEN / "cpu_records.jsonl"), read_jobs(GOLDEN / "cpu_records.jsonl")
    halved = {record.id for record in records if weights_were_halved(record)}
    assert 0 < len(halved) < len(records)
    assert {job.id for job in jobs if job.halved_weights} == halved
    assert not [job for job in read_jobs(GOLDEN / "measured/cpu_trainer.jsonl") if job.halved_weights]


def test_weights_are_undefined_only_where_they_are_split():
    job = JobSpec.model_validate({"model": {"name": "m", "config": {}}, "seq_len": 8, "zero": {"stage": 3}})
    assert not job.undefined_weights
    with pytest.raises(ValueError, match="undefined_weights is for zero"):
        JobSpec.model_validate({**job.model_dump(), "zero": {"stage": 2}, "undefined_weights": True})


def test_zero_keys_have_deepspeeds_names():
    zero = {"stage": 3, "zero_hpz_partition_size": 2, "prefetch_bucket_size": 5e7, "reduce_bucket_size": 5e8}
    zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    found = JobSpec(model={"name": "x", "config": {}}, seq_len=8, zero=zero).zero
    assert (found.hpz_partition_size, found.stage3_prefetch_bucket_size) == (2, 50_000_000)
    assert (found.reduce_bucket_size, found.offload_optimizer) == (500_000_000, "cpu")
