"""Exactly the assistant's tokens are learnt: checked by decoding what is trained on."""

from __future__ import annotations

import json

import numpy as np
import pytest

from vramplan.data.dataset import load_data
from vramplan.data.encode import encode_rows
from vramplan.data.row import Completion, Conversation, Text
from vramplan.data.sample import Sample
from vramplan.data.source import read_rows
from vramplan.data.template import DEFAULT_TEMPLATE, ensure_template, render
from vramplan.errors import DataError
from vramplan.spec.load import run_from_mapping

from support.tiny_model import tiny_tokenizer


@pytest.fixture
def tokenizer():
    return tiny_tokenizer()


def conversation(*turns: tuple[str, str]) -> Conversation:
    return Conversation("f line 1", tuple({"role": role, "content": content} for role, content in turns))


def trained_text(sample: Sample, tokenizer) -> str:
    return tokenizer.decode(sample.ids[sample.trained])


def test_all_of_every_assistant_turn_and_nothing_else_is_learnt(tokenizer):
    row = conversation(
        ("system", "be brief"), ("user", "2 x 3?"), ("assistant", "6."), ("user", "x 2?"), ("assistant", "12.")
    )
    (sample,) = encode_rows([row], tokenizer, 200)
    assert trained_text(sample, tokenizer) == "6.<|im_end|>12.<|im_end|>"
    assert tokenizer.decode(sample.ids) == render(row, tokenizer).text
    (everything,) = encode_rows([row], tokenizer, 200, "all")
    assert everything.num_targets == everything.num_tokens - 1


def test_every_row_of_the_built_in_set_is_masked_exactly(tokenizer):
    rows = read_rows("builtin:arithmetic")
    for row, sample in zip(rows, encode_rows(rows, tokenizer, 512), strict=True):
        assert trained_text(sample, tokenizer) == row.messages[1]["content"] + "<|im_end|>"


@pytest.mark.parametrize("content", ["\n\nindented\n  answer\n", " leading space", "<|im_end|> inside", "ünïcode → 🙂"])
def test_awkward_contents_are_masked_exactly(tokenizer, content):
    (sample,) = encode_rows([conversation(("user", "q"), ("assistant", content))], tokenizer, 400)
    assert trained_text(sample, tokenizer) == content + "<|im_end|>"


def test_generation_begins_where_learning_begins(tokenizer):
    row = conversation(("user", "q"), ("assistant", "a"))
    (sample,) = encode_rows([row], tokenizer, 100)
    prompt = tokenizer.apply_chat_template(list(row.messages[:1]), add_generation_prompt=True)["input_ids"]
    assert sample.ids[: len(prompt)].tolist() == prompt
    assert not sample.trained[: len(prompt)].any()
    assert sample.trained[len(prompt)]


def test_a_template_that_strips_its_turns_and_marks_no_end(tokenizer):
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] | trim }}\n{% endfor %}"
    (sample,) = encode_rows([conversation(("user", "q"), ("assistant", " a b \n"))], tokenizer, 100)
    assert "a b" in trained_text(sample, tokenizer)
    assert "q" not in trained_text(sample, tokenizer)


def test_a_template_that_rewrites_earlier_turns_is_refused_but_for_what_it_does_not_rewrite(tokenizer):
    tokenizer.chat_template = (  # as Qwen3's, which shows thoughts in the last turn alone
        "{% for m in messages %}{{ m['role'] }}:{% if loop.last and m['role'] == 'assistant' %}<think></think>"
        "{% endif %}{{ m['content'] }};{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    row = conversation(("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b"))
    with pytest.raises(DataError, match=r"f line 1: the chat template renders turn 2 differently.*train_on to last"):
        encode_rows([row], tokenizer, 100)
    (last,) = encode_rows([row], tokenizer, 100, "last")
    assert trained_text(last, tokenizer) == "<think></think>b;"
    (everything,) = encode_rows([row], tokenizer, 100, "all")
    assert trained_text(everything, tokenizer) == "user:q;assistant:a;user:r;assistant:<think></think>b;"
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] if loop.last else m['content'][:1] }};{% endfor %}"
    )
    row = conversation(("user", "question"), ("assistant", "answer"), ("user", "more"), ("assistant", "b"))
    with pytest.raises(
        DataError, match=r"renders turn 4 differently.*take a template that writes every turn alike, or"
    ):
        encode_rows([row], tokenizer, 100, "last")


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('no tools here') }}", r"refuses it \(no tools here\)"),
        ("{% for m in messages %}{{ m['content'] }", r"refuses it \(unexpected '}'\)"),
        ("{{ messages[0]['content'] + 1 }}", r"fails on it \(can only concatenate str"),
    ],
)
def test_a_template_that_does_not_take_a_row_is_named(tokenizer, template, said):
    tokenizer.chat_template = template
    with pytest.raises(DataError, match=f"f line 1: the tokenizer's chat template {said}"):
        encode_rows([conversation(("user", "q"), ("assistant", "a"))], tokenizer, 100)


def test_a_tokenizer_without_template_gets_the_stated_one(tokenizer):
    tokenizer.chat_template = None
    assert ensure_template(tokenizer)
    assert tokenizer.chat_template == DEFAULT_TEMPLATE
    assert not ensure_template(tokenizer)
    row = conversation(("user", "q"), ("assistant", "a"))
    assert render(row, tokenizer).text == "<|user|>\nq\n<|assistant|>\na<|im_end|>\n"
    (sample,) = encode_rows([row], tokenizer, 100)
    assert trained_text(sample, tokenizer) == "a<|im_end|>"


def test_a_completion_is_learnt_with_the_end_of_sequence(tokenizer):
    (sample,) = encode_rows([Completion("w", "1 + 1 =", " 2")], tokenizer, 50)
    assert trained_text(sample, tokenizer) == " 2<|im_end|>"
    assert tokenizer.decode(sample.ids) == "1 + 1 = 2<|im_end|>"


def test_text_is_cut_into_full_sequences_and_nothing_is_lost(tokenizer):
    rows = [Text("a", "one two three " * 30), Text("b", "four five " * 20)]
    samples = encode_rows(rows, tokenizer, 16)
    joined = [token for row in rows for token in [*tokenizer(row.text)["input_ids"], tokenizer.eos_token_id]]
    assert np.concatenate([sample.ids for sample in samples]).tolist() == joined[: sum(s.num_tokens for s in samples)]
    assert len(joined) - sum(sample.num_tokens for sample in samples) <= 1
    assert all(sample.num_tokens == 16 for sample in samples[:-1])
    assert all(sample.num_targets == sample.num_tokens - 1 for sample in samples)
    assert samples[0].where == "a"
    assert samples[-1].where == "b"


def test_a_row_whose_answer_lies_beyond_the_sequence_is_refused(tokenizer):
    row = conversation(("user", "long " * 50), ("assistant", "a"))
    needed = encode_rows([row], tokenizer, 400)[0].trained.argmax() + 1
    with pytest.raises(
        DataError, match=rf"f line 1: no token to learn lies within seq_len 20 \(the first is token {needed}\)"
    ):
        encode_rows([row], tokenizer, 20)
    assert encode_rows([row], tokenizer, needed)[0].num_targets == 1


def test_rows_without_anything_to_learn_are_left_out_where_that_is_asked_for(tokenizer, tmp_path):
    rows = [{"prompt": "long " * 50 if number % 3 == 1 else "a", "completion": "b"} for number in range(7)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields = {"train": str(path), "eval_frac": 0.0, "drop_unlearnable": True}
    data = load_data(run_from_mapping({"model": "x", "seq_len": 32, "data": fields}), tokenizer)
    assert [sample.where for sample in data.train] == [f"{path} line {number}" for number in (1, 3, 4, 6, 7)]
    assert data.notes[0] == (
        "2 of 7 rows were left out, for nothing of them that is learnt lies within seq_len 32 "
        f"({path} line 2 and others)"
    )
    with pytest.raises(DataError, match=r"line 2: no token to learn .* or set data\.drop_unlearnable"):
        load_data(
            run_from_mapping({"model": "x", "seq_len": 32, "data": {**fields, "drop_unlearnable": False}}), tokenizer
        )
    path.write_text(json.dumps(rows[1]) + "\n")
    with pytest.raises(DataError, match=r"holds nothing to learn within seq_len 32; raise it"):
        load_data(run_from_mapping({"model": "x", "seq_len": 32, "data": fields}), tokenizer)


@pytest.mark.parametrize("keep", ["memory", "disk"])
def test_a_source_whose_rows_all_weigh_nothing_is_refused(tokenizer, tmp_path, keep):
    path = tmp_path / "rows.jsonl"
    source = {"path": str(path), "weight_column": "w"}
    run = run_from_mapping({"model": "x", "seq_len": 32, "data": {"train": source, "eval_frac": 0.0, "keep": keep}})
    row = {"prompt": "a", "completion": "b"}
    path.write_text("".join(json.dumps(row | {"w": weight}) + "\n" for weight in (0, 0.5)))
    assert [sample.weight for sample in load_data(run, tokenizer).train] == [0, 0.5]
    path.write_text(json.dumps(row | {"w": 0}) + "\n")
    with pytest.raises(DataError, match=r"rows\.jsonl: holds nothing to learn \(every row's 'w' is 0\)"):
        load_data(run, tokenizer)


def test_a_cut_answer_is_counted_and_said(tokenizer):
    run = run_from_mapping({"model": "x", "seq_len": 96})
    data = load_data(run, tokenizer)
    cut = [sample for sample in (*data.train, *data.held_out) if sample.num_cut]
    assert cut
    assert data.notes == (
        f"{len(cut)} of {len(data.train) + len(data.held_out)} rows were cut to seq_len 96; "
        f"the longest has {max(96 + sample.num_cut for sample in cut)} tokens",
    )


def test_evaluation_data_of_its_own_holds_nothing_out(tokenizer, tmp_path):
    path = tmp_path / "eval.jsonl"
    path.write_text('{"prompt": "1 + 1 =", "completion": " 2"}\n')
    run = run_from_mapping({"model": "x", "seq_len": 512, "data": {"eval": str(path)}})
    data = load_data(run, tokenizer)
    assert len(data.train) == len(read_rows("builtin:arithmetic"))
    assert [sample.where for sample in data.held_out] == [f"{path} line 1"]
