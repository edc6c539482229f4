from __future__ import annotations

import json

import pytest

from vramplan.data.forms import parse_row
from vramplan.data.row import Completion, Conversation, Text
from vramplan.data.source import read_rows
from vramplan.errors import DataError, UnknownNameError

TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def test_each_form_is_recognised_and_other_keys_are_left_alone():
    conversation = parse_row(json.dumps({"messages": TURNS, "id": 7}), "f line 1")
    assert conversation == Conversation("f line 1", tuple(TURNS))
    assert parse_row('{"prompt": "p", "completion": "c"}', "w") == Completion("w", "p", "c")
    assert parse_row('{"text": "t"}', "w") == Text("w", "t")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "is not valid JSON"),
        ("[1]", "is JSON, but a list instead of an object"),
        ("{}", "it has no key"),
        ('{"question": "x"}', "or 'prompt' and 'completion', or 'text'; it has only 'question'"),
        ('{"prompt": "x"}', "it has only 'prompt'"),
        ('{"text": "x", "prompt": "p", "completion": "c"}', "mixes two forms"),
        ('{"messages": []}', "must be a list of turns, not an empty list"),
        ('{"messages": "x"}', "must be a list of turns, not text"),
        ('{"messages": ["x"]}', "turn 1 of 'messages' must be an object, not text"),
        (
            '{"messages": [{"role": "bot", "content": "x"}]}',
            "turn 1 of 'messages' has role 'bot'; it must be system or",
        ),
        ('{"messages": [{"role": "user", "content": "x"}]}', "has no assistant turn"),
        (
            '{"messages": [{"role": "user", "content": 5}]}',
            "turn 1 of 'messages': 'content' must be text, not a number",
        ),
        ('{"messages": [{"role": "user"}]}', "'content' must be text, not nothing"),
        ('{"messages": [{"role": "assistant", "content": " "}]}', "'content' is empty"),
        (
            json.dumps({"messages": [*TURNS, {"role": "system", "content": "x"}]}),
            "turn 3 of 'messages' is a system turn, which may only come first",
        ),
        ('{"prompt": "x", "completion": ""}', "'completion' is empty"),
        ('{"text": null}', "'text' must be text, not nothing"),
    ],
)
def test_what_is_wrong_with_a_row_is_said_with_its_place(line, said):
    with pytest.raises(DataError) as caught:
        parse_row(line, "rows.jsonl line 3")
    assert str(caught.value).startswith("rows.jsonl line 3: ")
    assert said in str(caught.value)


def write(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def test_lines_are_counted_as_an_editor_counts_them(tmp_path):
    # a line separator inside a JSON text is no end of line, and blank lines count
    path = write(tmp_path, "rows.jsonl", '{"text": "a\u2028b"}\n\n{"text": ""}\n')
    with pytest.raises(DataError, match=r"rows\.jsonl line 3: 'text' is empty"):
        read_rows(path)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("rows.jsonl", "\n", "holds no rows"),
        ("rows.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', "line 2: is not UTF-8 text"),
        ("rows.jsonl", '{"text": "a"}\n{"prompt": "p", "completion": "c"}\n', "line 2: is a completion row, but "),
        ("rows.xls", "x", "is of no known kind"),
        ("empty.txt", " ", "holds no rows"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, content, said):
    with pytest.raises(DataError, match=said):
        read_rows(write(tmp_path, name, content))


def test_a_missing_file_and_an_unknown_builtin():
    with pytest.raises(DataError, match=r"nowhere\.jsonl: there is no such file"):
        read_rows("nowhere.jsonl")
    with pytest.raises(DataError, match="there is no such file"):
        read_rows("nowhere")
    with pytest.raises(UnknownNameError, match="did you mean builtin:arithmetic"):
        read_rows("builtin:arithmetics")


def test_a_text_file_is_one_document(tmp_path):
    path = write(tmp_path, "doc.txt", "one\ntwo\n")
    assert read_rows(path) == [Text(path, "one\ntwo\n")]


def test_the_reference_of_python_is_raw_text():
    rows = read_rows("builtin:python-reference")
    assert all(isinstance(row, Text) for row in rows)
    assert sum(len(row.text) for row in rows) > 300_000
