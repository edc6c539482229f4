"""What is held out is not trained on: rows, and of raw text whole documents."""

from __future__ import annotations

import json
import re
from collections import Counter

import pytest

from vramplan.data.dataset import load_data
from vramplan.data.encode import encode_rows
from vramplan.data.holdout import held_out_documents, split
from vramplan.data.source import read_rows
from vramplan.errors import DataError
from vramplan.spec.load import run_from_mapping

from support.tiny_model import tiny_tokenizer

MARKERS = ["<fim_prefix>", "<fim_suffix>", "<fim_middle>"]


def written(path, lengths):
    """A file of documents, each of a word of its own (``<7>``) that is repeated."""
    path.write_text("".join(json.dumps({"text": f"<{n}>" * length}) + "\n" for n, length in enumerate(lengths)))
    return str(path)


def loaded(seed=0, **data):
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": MARKERS})
    fields = {"model": "x", "seq_len": 32, "training": {"seed": seed}, "data": data}
    found = load_data(run_from_mapping(fields), tokenizer)

    def words(samples):
        """How often each document's word is in them; words that are cut between sequences aside."""
        text = (tokenizer.decode(sample.ids) for sample in samples)
        return Counter(word for each in text for word in re.findall(r"<\d+>", each))

    return found, words


def test_the_held_out_part_is_disjoint_and_decided_by_the_seed():
    samples = encode_rows(read_rows("builtin:arithmetic"), tiny_tokenizer(), 512)
    train, held_out = split(samples, 0.1, seed=3)
    assert len(held_out) == round(0.1 * len(samples))
    assert {sample.where for sample in train} & {sample.where for sample in held_out} == set()
    assert len(train) + len(held_out) == len(samples)
    assert list(split(samples, 0.1, seed=3)[1]) == list(held_out)
    assert list(split(samples, 0.1, seed=4)[1]) != list(held_out)
    assert split(samples, 0.0, seed=3) == (samples, ())
    with pytest.raises(DataError, match="holds out all of 2 samples"):
        split(samples[:2], 0.9, seed=0)


@pytest.mark.parametrize(
    "extra",
    [{}, {"keep": "disk"}, {"packing": "best_fit"}, {"fim": {"rate": 1}}, {"keep": "disk", "fim": {"rate": 0.5}}],
    ids=str,
)
def test_no_document_that_is_held_out_is_trained_on_in_part(tmp_path, extra):
    source = written(tmp_path / "texts.jsonl", [20 + n % 7 for n in range(40)])
    data, words = loaded(train=source, eval_frac=0.2, **extra)
    train, held_out = words(data.train), words(data.held_out)
    assert len(data.held_out) > len(held_out)  # so a draw of sequences would have met documents on both sides
    assert train.keys() & held_out.keys() == set()
    assert len(train) + len(held_out) == 40
    assert len(held_out) in (7, 8, 9)
    assert data.notes == ()
    again, other = (loaded(seed, train=source, eval_frac=0.2, **extra)[0] for seed in (0, 1))
    assert words(again.held_out) == held_out
    assert words(other.held_out) != held_out


def test_replay_of_raw_text_holds_out_whole_documents(tmp_path):
    source = written(tmp_path / "texts.jsonl", [20] * 30)
    data, words = loaded(train=source, replay={"path": source, "share": 0.25, "eval_frac": 0.1})
    (general,) = (part for part in data.stream.parts if part.is_replay)
    train = words(data.train[index] for index in range(general.first, general.first + general.size))
    assert train.keys() & words(data.held_out_replay).keys() == set()
    assert (len(train), len(words(data.held_out_replay))) == (27, 3)


def test_of_a_single_document_sequences_are_held_out_and_that_is_said(tmp_path):
    (tmp_path / "one.txt").write_text("some words and more of them " * 200)
    data, _ = loaded(train=str(tmp_path / "one.txt"), eval_frac=0.1)
    assert len(data.held_out) == round(0.1 * (len(data.train) + len(data.held_out))) > 1
    (note,) = data.notes
    assert "one.txt is one document: sequences of it are held out, though the text around them is trained on" in note
    assert loaded(train=str(tmp_path / "one.txt"), eval_frac=0)[0].notes == ()


def test_documents_are_held_out_by_their_size(tmp_path):
    for seed in range(10):
        assert held_out_documents([1000, 50, 1000], 0.05, seed) == {1}
        assert len(held_out_documents([10] * 200, 0.05, seed)) == 10
        assert len(held_out_documents([10] * 3, 0.01, seed)) == 1
    with pytest.raises(DataError, match=r"data\.eval_frac 0\.9 holds out all of 2 documents"):
        held_out_documents([10, 10], 0.9, 0)
    data, _ = loaded(train=written(tmp_path / "two.jsonl", [20, 20]), eval_frac=0.05)
    (note,) = data.notes
    assert "1 of 2 documents, 50.0% of its text, are held out" in note
    assert "(data.eval_frac asks for 5.0%)" in note
