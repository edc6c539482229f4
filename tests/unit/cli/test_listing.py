"""``models``, ``gpus`` and ``doctor`` print what they know, for people and for programs."""

from __future__ import annotations

import json

import pytest

from vramplan.cli.app import main
from vramplan.facts.catalogue import all_models
from vramplan.facts.devices import all_devices


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert not end.value.code
    return capsys.readouterr().out


def test_models_as_json_are_counted(capsys):
    rows = {row["name"]: row for row in json.loads(run(capsys, "models", "--json"))}
    assert set(rows) == {entry.name for entry in all_models()}
    llama = rows["meta-llama/Llama-3.1-8B"]
    assert llama["params_total"] == sum(llama["params_by_role"].values()) == 8_030_261_248
    assert llama["source"]
    assert rows["internlm/internlm2-7b"]["params_total"] is None
    assert "never run" in rows["internlm/internlm2-7b"]["not_counted_because"]


def test_models_as_a_table_have_whole_rows_and_sources(capsys):
    text = run(capsys, "models", "llama-3.1-8b")
    row = next(line for line in text.splitlines() if line.startswith("meta-llama/Llama-3.1-8B "))
    assert "8,030,261,248" in row
    assert "ai-dynamo/aiconfigurator" in row
    assert "published: 8,030,261,248" in text


def test_gpus_as_json(capsys):
    rows = json.loads(run(capsys, "gpus", "--json"))
    assert [row["name"] for row in rows] == [device.name for device in all_devices()]
    assert all(row["usable_bytes"] <= row["memory_bytes"] and row["source"] for row in rows)


def test_gpus_as_a_table(capsys):
    text = run(capsys, "gpus", "rtx4090")
    row = next(line for line in text.splitlines() if line.startswith("GeForce RTX 4090 "))
    assert "24.0 GiB" in row
    assert "23.5 GiB" in row
    assert len(run(capsys, "gpus").splitlines()) == len(all_devices()) + 2


def test_doctor_prints_versions_and_findings(capsys):
    text = run(capsys, "doctor")
    assert "deepspeed" in text
    assert "/dev/shm" in text
    report = json.loads(run(capsys, "doctor", "--json"))
    assert {"versions", "gpus", "host", "deepspeed_ops", "findings"} <= set(report)
    assert all(item["level"] in ("ok", "hurts", "blocks") for item in report["findings"])


def test_the_help_of_select_says_what_is_chosen_without_a_target(capsys):
    assert "all of them without --target" in " ".join(run(capsys, "data", "select", "--help").replace("│", " ").split())
