"""A run with everything that data offers at once: exact shares, packs, weights, hard examples, noise; and resumed."""

from __future__ import annotations

import json
import shutil

import pytest

from vramplan.measure.run_dir import RunDir

from support.training import events_of, losses, train, write_spec

pytestmark = pytest.mark.ranks


def write_rows(path, count, word):
    rows = [{"question": f"{word} {i}?", "answer": f"{i} {word} " * (1 + i % 5), "w": 1 + i % 3} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"path": str(path), "fields": {"prompt": "question", "completion": "answer"}, "weight_column": "w"}


def test_everything_at_once_and_resumed_bit_for_bit(tiny_model, tmp_path):
    data = {
        "train": [write_rows(tmp_path / "a.jsonl", 80, "one"), write_rows(tmp_path / "b.jsonl", 60, "two")],
        "replay": {"path": "builtin:arithmetic", "share": 0.25},
        "packing": "best_fit",
        "hard_examples": {"temperature": 0.5},
        "augment": {"neftune_alpha": 5, "token_dropout": 0.1, "prompt_templates": ["Q: {prompt} A:", "{prompt}"]},
        "eval_frac": 0.1,
    }
    spec = write_spec(tmp_path / "spec.yaml", tiny_model, 2, data=data)
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    done = train(spec, "-o", whole)
    assert done.returncode == 0, done.stdout + done.stderr
    assert max(event["epoch"] for event in events_of(whole, "step")) >= 1  # so hard examples were drawn
    falling = losses(whole)
    assert falling[6] < falling[1]
    assert RunDir(whole).sample_losses.stat().st_size == 6 * 8 * 12
    shutil.copytree(whole, resumed)
    shutil.rmtree(RunDir(resumed).checkpoints / "step-00000006")
    for name in ("adapter", "model"):
        shutil.rmtree(resumed / name, ignore_errors=True)
    done = train(resumed, "--resume")
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(resumed) == falling
    weights = "model/model.safetensors"
    assert (resumed / weights).read_bytes() == (whole / weights).read_bytes()
    assert RunDir(resumed).sample_losses.read_bytes() == RunDir(whole).sample_losses.read_bytes()
