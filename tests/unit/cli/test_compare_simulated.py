"""``vramplan compare --simulate``: the simulator's figures beside the estimator's and the measured ones."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from vramplan.measure.compare import compare_file
from vramplan.report.compared import render_comparison

GOLDEN = Path(__file__).parents[2] / "golden"
TAKEN = {"CA028": "cpu_records.jsonl", "gpt_neox-a": "measured/cpu_families.jsonl"}


@pytest.fixture
def records(tmp_path):
    """Two measured runs, one whose spec no version understands, and one that ran out of memory."""
    lines = [
        json.loads(line)
        for key, name in TAKEN.items()
        for line in (GOLDEN / name).read_text(encoding="utf-8").splitlines()
        if json.loads(line)["id"] == key
    ]
    odd = {**lines[1], "id": "odd", "spec": {**lines[1]["spec"], "optimizer": "newton"}}
    oom = {**lines[1], "id": "oom", "measured": {"outcome": "oom"}}
    path = tmp_path / "records.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in (*lines, odd, oom)), encoding="utf-8")
    return path


def compare(*words):
    command = [sys.executable, "-m", "vramplan", "compare", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_every_record_has_its_simulated_figure_or_the_reason(records):
    done = compare(records, "--simulate", "--json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    found = {record["id"]: record for record in answer["records"]}
    assert list(found) == [*TAKEN, "odd", "oom"]
    errors = []
    for key in TAKEN:
        record = found[key]
        error = record["simulated_bytes"] / record["measured_bytes"] - 1
        assert record["simulated_error_frac"] == pytest.approx(error)
        assert abs(error) <= 0.002
        errors.append(error)
    assert (found["odd"]["simulated_bytes"], found["odd"]["simulated_error_frac"]) == (None, None)
    assert found["oom"]["simulated_bytes"] == found["gpt_neox-a"]["simulated_bytes"]
    assert found["oom"]["simulated_error_frac"] is None
    summary = answer["simulated_summary"]
    assert set(summary) == set(answer["summary"])
    assert (summary["num_records"], summary["num_covered"]) == (4, 2)
    assert summary["worst_under_frac"] == min(0.0, *errors)
    assert summary["worst_over_frac"] == max(0.0, *errors)
    assert summary["median_abs_error_frac"] == pytest.approx(sum(map(abs, errors)) / 2)

    plain = json.loads(compare(records, "--json").stdout)
    assert "simulated_summary" not in plain
    assert plain["summary"] == answer["summary"]
    assert "simulated_bytes" not in plain["records"][0]


def test_the_report_has_a_column_for_it(records):
    compared = compare_file(records)
    shown = [replace(record, simulated_bytes=record.predicted_bytes) for record in compared.records[:2]]
    shown += [replace(record, simulated_reason="no such optimizer") for record in compared.records[2:3]]
    console = Console(width=1000, record=True, file=StringIO())
    console.print(render_comparison(replace(compared, records=tuple(shown), with_simulation=True)))
    lines = console.export_text().splitlines()
    assert lines[0].split() == ["record", "run", "predicted", "measured", "error", "simulated", "error"]
    assert next(line for line in lines if line.startswith("CA028")).count("%") == 2
    assert any(line.startswith("simulated: 2 of 3 records compared: median |error| ") for line in lines)
    assert any(line.startswith("not simulated: odd") and "no such optimizer" in line for line in lines)
