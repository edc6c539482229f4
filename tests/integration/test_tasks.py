"""lm_eval judges what was trained, by tasks that lie on this machine."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path

import pytest

from vramplan.measure.run_dir import RunDir

from support.training import events_of, train, write_spec

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs the extra eval"),
]
QUESTIONS = [(2, 3), (4, 1), (5, 5), (7, 2), (1, 8), (6, 3)]


def write_task(directory: Path, data: Path | None = None) -> Path:
    """A task of six sums, each with the right answer among three; without ``data`` its file is missing."""
    directory.mkdir()
    rows = directory / "sums.jsonl"
    lines = [
        json.dumps({"question": f"{a} + {b} =", "choices": [str(a + b + wrong) for wrong in (0, 1, 2)], "answer": 0})
        for a, b in QUESTIONS
    ]
    rows.write_text("\n".join(lines) + "\n")
    (directory / "sums.yaml").write_text(
        f"""task: vramplan_sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data or rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
"""
    )
    return directory


def spec_with(tmp_path: Path, model: Path, method: str, directory: Path, **fields) -> Path:
    asked = {"tasks": ["vramplan_*"], "include_path": str(directory), **fields}
    return write_spec(tmp_path / "spec.yaml", model, 1, method, training={"max_steps": 2, "lm_eval": asked})


@pytest.mark.parametrize("method", ["full", "lora"])
def test_scores_are_those_of_the_saved_model_and_stand_everywhere(method, tiny_model, tmp_path):
    spec = spec_with(tmp_path, tiny_model, method, write_task(tmp_path / "tasks"))
    done = train(spec, "-o", tmp_path / "run")
    assert done.returncode == 0, done.stdout + done.stderr
    run_dir = RunDir(tmp_path / "run")
    (event,) = events_of(tmp_path / "run", "lm_eval")
    assert event["task"] == "vramplan_sums"
    assert event["num_examples"] == len(QUESTIONS)
    assert event["scores"]["acc"] == pytest.approx(accuracy(method, tiny_model, run_dir))
    whole = json.loads(run_dir.lm_eval.read_text())
    assert whole["results"]["vramplan_sums"]["acc,none"] == event["scores"]["acc"]
    assert f"lm_eval vramplan_sums: acc {event['scores']['acc']:.4f} ±" in done.stdout
    card = ((run_dir.adapter if method == "lora" else run_dir.model) / "README.md").read_text()
    assert f"| vramplan_sums | {len(QUESTIONS)} | acc | {event['scores']['acc']:.4f} |" in card
    assert "for 2 optimizer steps" in card


def accuracy(method: str, base: Path, run_dir: RunDir) -> float:
    """Share of the sums whose right answer is the likeliest of the three, computed here, answer by answer."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    saved = run_dir.adapter if method == "lora" else run_dir.model
    model = AutoModelForCausalLM.from_pretrained(base if method == "lora" else saved, dtype=torch.float32)
    if method == "lora":
        model = PeftModel.from_pretrained(model, str(saved))
    tokenizer, right = AutoTokenizer.from_pretrained(saved), 0
    for a, b in QUESTIONS:
        scores = []
        for wrong in (0, 1, 2):
            asked, whole = f"{a} + {b} =", f"{a} + {b} = {a + b + wrong}"
            first, ids = len(tokenizer(asked)["input_ids"]), tokenizer(whole, return_tensors="pt")["input_ids"]
            with torch.no_grad():
                logs = model(input_ids=ids).logits[0].log_softmax(-1)
            scores.append(sum(float(logs[at - 1, ids[0, at]]) for at in range(first, ids.shape[1])))
        right += scores[0] == max(scores)
    assert all(map(math.isfinite, scores))
    return right / len(QUESTIONS)


def test_an_unknown_task_is_said_before_launch_and_one_without_data_leaves_the_run_whole(tiny_model, tmp_path):
    tasks = write_task(tmp_path / "tasks", tmp_path / "gone.jsonl")
    unknown = train(spec_with(tmp_path, tiny_model, "full", tasks, tasks=["vramplan_sum"]), "-o", tmp_path / "refused")
    assert unknown.returncode == 2
    assert "training.lm_eval.tasks: lm_eval knows no task 'vramplan_sum'; did you mean vramplan_sums" in unknown.stderr
    assert not (tmp_path / "refused").exists()
    done = train(spec_with(tmp_path, tiny_model, "full", tasks), "-o", tmp_path / "run")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "training.lm_eval gave no scores (FileNotFoundError: " in done.stdout
    assert (RunDir(tmp_path / "run").model / "model.safetensors").exists()
