"""The search for the largest micro-batch, and one boundary found for real."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vramplan.cli.app import main
from vramplan.measure.boundary import estimated_largest, largest_that
from vramplan.measure.record import JobSpec, read_records
from vramplan.units import MIB

CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 16384,
    "max_position_embeddings": 512,
}
JOB = {"id": "tiny", "model": {"name": "tiny", "config": CONFIG}, "seq_len": 512, "steps": 1}


@given(st.integers(0, 4096), st.integers(-5, 5000))
def test_the_search_finds_the_largest_and_asks_nothing_twice(largest, guess):
    asked = []

    def fits(number):
        asked.append(number)
        return number <= largest

    assert largest_that(fits, guess) == largest
    assert len(asked) == len(set(asked)) <= 26
    assert all(1 <= number <= 4096 for number in asked)


@given(st.integers(1, 4000))
def test_a_right_guess_costs_two_runs(largest):
    asked = []
    largest_that(lambda number: asked.append(number) or number <= largest, largest)
    assert len(asked) == 2


@pytest.mark.parametrize("cap", [200 * MIB, 400 * MIB, 900 * MIB])
def test_more_room_allows_no_smaller_micro_batch(cap):
    allowed = [
        estimated_largest(JobSpec.model_validate({**JOB, "cap_bytes": bytes_}), "cpu") for bytes_ in (cap, 2 * cap)
    ]
    assert 0 <= allowed[0] < allowed[1]


def test_a_job_without_a_capacity_is_an_error(tmp_path, capsys):
    (tmp_path / "jobs.jsonl").write_text(json.dumps(JOB), encoding="utf-8")
    with pytest.raises(SystemExit) as end:
        main(["bench", "boundary", str(tmp_path / "jobs.jsonl"), "-o", str(tmp_path / "out.jsonl")])
    assert end.value.code == 2
    assert "job 'tiny': has no cap_bytes; give it one, or all of them one by --cap" in capsys.readouterr().err


@pytest.mark.ranks
def test_what_runs_under_a_limit_of_the_cpu(tmp_path, capsys):
    """The estimate counts tensors; the limit counts what the process makes beside them too."""
    (tmp_path / "jobs.jsonl").write_text(json.dumps(JOB), encoding="utf-8")
    out = tmp_path / "out.jsonl"
    command = ["bench", "boundary", str(tmp_path / "jobs.jsonl"), "--cap", "700MiB", "-o", str(out), "--json"]

    def boundary():
        with pytest.raises(SystemExit) as end:
            main(command)
        assert not end.value.code
        (found,) = json.loads(capsys.readouterr().out)
        return found

    found = boundary()
    measured, estimated = found["measured_micro_batch_size"], found["estimated_micro_batch_size"]
    assert 1 <= measured <= estimated
    runs = {run["micro_batch_size"]: run["outcome"] for run in found["runs"]}
    assert (runs[measured], runs[measured + 1]) == ("ok", "oom")
    records = read_records(out)
    assert {record.spec.micro_batch_size: record.measured.outcome for record in records} == runs
    assert all(record.measured.host_rss_peak_bytes for record in records)

    assert boundary() == found  # from the records: nothing runs again
    assert len(read_records(out)) == len(records)
