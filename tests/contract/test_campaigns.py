"""The jobs to measure on a GPU can be read, and what they say can be asked of the stack."""

from pathlib import Path

import pytest

from vramplan.emit.deepspeed import ds_config
from vramplan.facts.resolve import resolve_architecture
from vramplan.measure.record import read_jobs
from vramplan.measure.record_spec import run_from_record_spec
from vramplan.spec.alloc_conf import AllocConf

CAMPAIGN = Path(__file__).parents[2] / "benchmarks" / "campaigns" / "gpu.jsonl"
JOBS = read_jobs(CAMPAIGN)


def test_the_campaign_is_whole():
    assert len(JOBS) == 104
    assert {job.zero.stage for job in JOBS} == {0, 1, 2, 3}
    assert {job.method.kind for job in JOBS} == {"full", "lora", "qlora"}


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.id)
def test_a_job_says_a_whole_run(job):
    run, layout = run_from_record_spec(job)
    config = ds_config(run, layout.world_size)
    assert config["train_micro_batch_size_per_gpu"] == job.micro_batch_size
    assert config["zero_optimization"]["stage"] == job.zero.stage
    assert resolve_architecture(run).num_params > 0
    AllocConf.parse(job.alloc_conf)
