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


def test_csv_cells_are_the_text_that_they_are(tmp_path):
    rows = [{"prompt": "007", "completion": "None"}, {"prompt": "1.50", "completion": "NA"}]
    with (tmp_path / "a.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], "text"])  # an empty cell is a missing one: the row is of one form
        writer.writeheader()
        writer.writerows(rows)
    assert contents(tmp_path / "a.csv") == [("007", "None"), ("1.50", "NA")]
    (tmp_path / "b.tsv").write_text("prompt\tcompletion\n1\t2\n3\t4\n")
    assert contents(tmp_path / "b.tsv") == [("1", "2"), ("3", "4")]


@pytest.mark.filterwarnings("ignore:Length of header")  # pandas' own words on the empty cells that it leaves out
def test_a_csv_row_longer_than_the_header_does_not_shift_its_names(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,completion\nhi, there,answer\n")
    with pytest.raises(DataError, match="row 1: has more cells than the header has names"):
        contents(tmp_path / "a.csv")
    (tmp_path / "b.csv").write_text("prompt,completion\nhi,answer,\n")
    assert contents(tmp_path / "b.csv") == [("hi", "answer")]


def test_json_values_are_what_they_are(tmp_path):
    path = tmp_path / "a.json"
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho", "name": "x"}]
    path.write_text(json.dumps([{"messages": turns}, {"messages": turns, "meta": 1}, {"messages": turns, "meta": "m"}]))
    assert [row.messages[1]["content"] for row in iter_rows(SourceSpec(path=str(path)))] == ["ho"] * 3
    path.write_text(json.dumps([{"prompt": "when", "completion": "2020-01-01"}], indent=2))
    assert contents(path) == [("when", "2020-01-01")]
    path.write_text(json.dumps([{"prompt": "p", "completion": "c"}, {"prompt": "p", "completion": 3}]))
    rows = iter_rows(SourceSpec(path=str(path)))
    assert next(rows).completion == "c"  # not in quotation marks for the number below it
    with pytest.raises(DataError, match="row 2: 'completion' must be text, not a number"):
        next(rows)


def test_json_files_of_other_shapes(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))  # JSON lines under another name
    assert contents(path) == [(row["prompt"], row["completion"]) for row in ROWS]
    path.write_text(json.dumps(["one", "two"]))
    assert [row.text for row in iter_rows(SourceSpec(path=str(path)))] == ["one", "two"]
    path.write_text(json.dumps(ROWS[0], indent=1))
    assert len(contents(path)) == 1
    for text, said in (("", "holds no rows"), ("[1]", "row 1: is JSON, but a number instead of an object")):
        path.write_text(text)
        with pytest.raises(DataError, match=said):
            contents(path)


def test_a_hub_set_with_values_of_unlike_kinds_comes_decoded(tmp_path):
    rows = [{"prompt": "p", "completion": "c"}, {"prompt": "p", "completion": 3}]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = iter_rows(SourceSpec(path=f"hub:{tmp_path}"))
    assert next(found).completion == "c"


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
        ("bad.json", "bad.json: is not valid JSON"),
        ("bad.parquet", "bad.parquet: cannot be read"),
        ("bad.csv", "bad.csv row 1: 'completion' must be text, not nothing"),
        ("none.csv", "none.csv: there is no such file"),
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
    paths = run({"train": ["a.jsonl", {"path": "b.jsonl", "form": "text"}]}).train_sources
    assert paths == (SourceSpec(path="a.jsonl"), SourceSpec(path="b.jsonl", form="text"))
    two = run({"train": [{"path": "a", "weight": 1}, {"path": "b", "weight": 2}], "replay": {"path": "c"}, "eval": "d"})
    assert [source.path for source in two.sources] == ["a", "b", "c", "d"]
    with pytest.raises(SpecError, match="give every source a weight, or none"):
        run({"train": [{"path": "a", "weight": 1}, {"path": "b"}]})
    with pytest.raises(SpecError, match=r"must hold .prompt. exactly once"):
        run({"augment": {"prompt_templates": ["no place"]}})
    with pytest.raises(SpecError, match="unknown key 'wieght'"):
        run({"train": {"path": "a", "wieght": 1}})
