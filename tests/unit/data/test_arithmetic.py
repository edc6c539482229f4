"""The built-in questions are what the calculator answers today."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest

from vramplan.data.source import read_rows

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("make_dataset", ROOT / "scripts" / "make_dataset.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_file_is_what_the_script_makes(script):
    assert script.TARGET.read_text(encoding="utf-8") == script.jsonl(), "run scripts/make_dataset.py"


def test_every_row_is_valid_and_no_question_comes_twice():
    rows = read_rows("builtin:arithmetic")
    questions = [row.messages[0]["content"] for row in rows]
    assert len(set(questions)) == len(questions) > 300
    assert all([message["role"] for message in row.messages] == ["user", "assistant"] for row in rows)


def test_answers_are_right_by_arithmetic_done_here(script):
    """Two moments of four bytes each, divided from stage 1 on."""
    asked = re.compile(r"AdamW's states of an? ([\d.]+) B model take under ZeRO-(\d) on (\d+) GPUs")
    checked = 0
    for line in script.jsonl().splitlines():
        question, answer = (message["content"] for message in json.loads(line)["messages"])
        if match := asked.search(question):
            billions, stage, ranks = float(match[1]), int(match[2]), int(match[3])
            expected = round(billions * 1e9) * 8 / (ranks if stage >= 1 else 1)
            assert f"= {expected:,.0f} bytes" in answer
            checked += 1
    assert checked > 50


def test_parameter_counts_are_the_published_ones(script):
    text = script.jsonl()
    assert "Llama-3.1-8B has 8,030,261,248 parameters (8.03 B)." in text
    assert "gpt2 has 124,439,808 parameters" in text
