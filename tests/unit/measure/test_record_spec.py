"""A record's spec whose fields cannot stand together is one sentence with the job's name."""

import json
from pathlib import Path

import pytest

from vramplan.errors import SpecError
from vramplan.measure.record import JobSpec
from vramplan.measure.record_spec import run_from_record_spec

RECORDS = Path(__file__).resolve().parents[2] / "golden/measured/cpu_torch.jsonl"


def test_plain_torch_with_a_zero_stage():
    with RECORDS.open(encoding="utf-8") as lines:
        spec = json.loads(next(lines))["spec"]
    with pytest.raises(SpecError) as raised:
        run_from_record_spec(JobSpec.model_validate({**spec, "id": "X", "zero": {"stage": 2}}))
    assert str(raised.value) == (
        "job X: engine torch partitions nothing, but zero.stage is 2: leave it out, or use engine deepspeed"
    )
