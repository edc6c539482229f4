"""Every form and every kind of file gives the same rows; columns can be renamed; weights are read."""

from __future__ import annotations

import csv
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vramplan.data.forms import detect_form, row_from_fields
from vramplan.data.row import Completion, Conversation, Text
from vramplan.data.source import check_rows
from vramplan.data.tables import iter_rows
from vramplan.errors import DataError, SpecError
from vramplan.spec.data import SourceSpec
from vramplan.spec.load import run_from_mapping

USER, ASSISTANT = {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}


@pytest.mark.parametrize(
    ("fields", "form"),
    [
        ({"messages": [USER, ASSISTANT]}, "messages"),
        ({"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]}, "sharegpt"),
        ({"conversations": [USER, ASSISTANT]}, "sharegpt"),
        ({"instruction": "2 + 2?", "input": "", "output": "4"}, "alpaca"),
    ],
)
def test_chat_forms_give_the_same_conversation(fields, form):
    assert detect_form(fields, "w") == form
    assert row_from_fields(fields, "w") == Conversation("w", (USER, ASSISTANT))


def test_alpaca_with_input_and_system():
    row = row_from_fields({"system": "S", "instruction": "Add.", "input": "2 2", "output": "4"}, "w")
    assert [turn["content"] for turn in row.messages] == ["S", "Add.\n\n2 2", "4"]
    assert [turn["role"] for turn in row.messages] == ["system", "user", "assistant"]


def test_a_field_map_names_columns_of_other_names():
    source = SourceSpec(path="x", fields={"prompt": "question", "completion": "answer"}, weight_column="w")
    row = row_from_fields({"question": "q", "answer": "a", "w": "0.25", "text": None}, "here", source)
    assert row == Completion("here", "q", "a", 0.25)
    with pytest.raises(DataError, match=r"here: has no column 'question', which fields.prompt names"):
        row_from_fields({"quest": "q", "answer": "a"}, "here", source)


def test_a_named_form_decides_over_other_keys():
    fields = {"text": "t", "prompt": "p", "completion": "c"}
    assert row_from_fields(fields, "w", SourceSpec(path="x", form="text")) == Text("w", "t")
    with pytest.raises(DataError, match=r"mixes two forms \(completion, text\)"):
        row_from_fields(fields, "w")
    with pytest.raises(DataError, match="form alpaca needs 'instruction' and 'output'; it has only 'text'"):
        row_from_fields({"text": "t"}, "w", SourceSpec(path="x", form="alpaca"))


@pytest.mark.parametrize("weight", ["heavy", -1, float("nan"), True, None])
def test_a_weight_must_be_a_number_at_least_zero(weight):
    with pytest.raises(DataError, match="w: the weight 'n' must be a number at least 0"):
        row_from_fields({"text": "t", "n": weight}, "w", SourceSpec(path="x", weight_column="n"))


def test_an_unknown_speaker_is_named():
    with pytest.raises(DataError, match="turn 1 of 'conversations' has from 'alien'"):
        row_from_fields({"conversations": [{"from": "alien", "value": "x"}]}, "w")


ROWS = [{"prompt": f"p{number}, \n", "completion": f"c{number}"} for number in range(3)]


def write_all(directory):
    (directory / "a.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (directory / "b.json").write_text(json.dumps(ROWS))
    pq.write_table(pa.Table.from_pylist(ROWS), directory / "d.parquet")
    for name, delimiter in (("c.csv", ","), ("e.tsv", "\t")):
        with (directory / name).open("w", newline="") as file:
            writer = csv.DictWriter(file, ROWS[0], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(ROWS)


def contents(path):
    return [(row.prompt, row.completion) for row in iter_rows(SourceSpec(path=str(path)))]


def test_every_kind_of_file_gives_the_same_rows(tmp_path):
    write_all(tmp_path)
    expected = [(row["prompt"], row["completion"]) for row in ROWS]
    for path in sorted(tmp_path.iterdir()):
        assert contents(path) == expected, path.name
    assert contents(tmp_path / "*.[jp]*") == expected * 3  # a glob, in order of names
    assert contents(tmp_path) == expected * 5
    check_rows(SourceSpec(path=str(tmp_path)))


def test_a_directory_of_text(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "b.md").write_text("two")
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "c.bin").write_bytes(b"\xff")
    assert [row.text for row in iter_rows(SourceSpec(path=str(tmp_path)))] == ["one", "two"]


def test_what_is_wrong_with_a_table_is_one_sentence(tmp_path):
    (tmp_path / "bad.json").write_text('[{"prompt": "p"')
    (tmp_path / "bad.parquet").write_bytes(b"x")
    (tmp_path / "bad.csv").write_text("prompt,completion\np,\n")
    for name, said in (
        ("bad.json", "bad.json: cannot be read"),
        ("bad.parquet", "bad.parquet: cannot be read"),
        ("bad.csv", "bad.csv row 1: 'completion' must be text, not nothing"),
        ("none.csv", "none.csv: cannot be read"),
        ("none*.csv", r"none\*.csv: no file matches it"),
    ):
        with pytest.raises(DataError, match=said) as caught:
            contents(tmp_path / name)
        assert "\n" not in str(caught.value)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="the directory holds no file"):
        contents(tmp_path / "empty")


def test_specs_of_sources():
    def run(data):
        return run_from_mapping({"model": "x", "data": data}).data

    assert run({"train": "a.jsonl"}).train_sources == (SourceSpec(path="a.jsonl"),)
    two = run({"train": [{"path": "a", "weight": 1}, {"path": "b", "weight": 2}], "replay": {"path": "c"}, "eval": "d"})
    assert [source.path for source in two.sources] == ["a", "b", "c", "d"]
    with pytest.raises(SpecError, match="give every source a weight, or none"):
        run({"train": [{"path": "a", "weight": 1}, {"path": "b"}]})
    with pytest.raises(SpecError, match=r"must hold .prompt. exactly once"):
        run({"augment": {"prompt_templates": ["no place"]}})
    with pytest.raises(SpecError, match="unknown key 'wieght'"):
        run({"train": {"path": "a", "wieght": 1}})
