"""Packs hold every token once, waste little, and give the loss that the rows give alone."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from vramplan.data.batch import collate
from vramplan.data.dataset import load_data
from vramplan.data.encode import encode_rows
from vramplan.data.packing import best_fit, pack
from vramplan.data.sample import Sample
from vramplan.data.source import read_rows
from vramplan.errors import DataError
from vramplan.spec.load import run_from_mapping
from vramplan.train.loss import batch_loss, takes_num_targets

from support.tiny_model import tiny_tokenizer


@given(st.lists(st.integers(1, 64), min_size=1, max_size=200))
def test_every_document_is_in_one_bin_and_no_bin_overflows(lengths):
    bins = best_fit(lengths, 64)
    assert sorted(index for members in bins for index in members) == list(range(len(lengths)))
    fills = sorted(sum(lengths[index] for index in members) for members in bins)
    assert fills[-1] <= 64
    # two bins that fit together would have been one: at most one bin is half full or less
    assert all(first + second > 64 for first, second in pairwise(fills))


def naive_best_fit(lengths, capacity):
    bins: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        rooms = [capacity - sum(lengths[member] for member in members) for members in bins]
        fitting = [room for room in rooms if room >= lengths[index]]
        if fitting:
            bins[rooms.index(min(fitting))].append(index)
        else:
            bins.append([index])
    return bins


@given(st.lists(st.integers(1, 20), min_size=1, max_size=60))
def test_bins_are_filled_as_by_the_definition(lengths):
    def fills(bins):
        return sorted(sum(lengths[index] for index in members) for members in bins)

    assert fills(best_fit(lengths, 20)) == fills(naive_best_fit(lengths, 20))


@pytest.fixture(scope="module")
def samples():
    rows = read_rows("builtin:arithmetic")[::29][:14]
    return encode_rows(rows, tiny_tokenizer(), 200)


def test_a_pack_keeps_tokens_masks_and_weights(samples):
    weighted = [Sample(s.where, s.ids, s.trained, weight=1 + i / 8) for i, s in enumerate(samples)]
    packs = pack(weighted, 400)
    assert len(packs) < len(samples)
    assert sum(each.num_tokens for each in packs) == sum(each.num_tokens for each in samples)
    assert sum(each.num_targets for each in packs) == sum(each.num_targets for each in samples)
    assert sum(p.target_weight for p in packs) == pytest.approx(sum(s.num_targets * s.weight for s in weighted))
    for each in packs:
        starts = np.concatenate([[0], np.cumsum(each.doc_lengths)[:-1]])
        assert (each.positions[starts] == 0).all()
        assert (np.flatnonzero(each.positions == 0) == starts).all()
        assert not each.trained[starts].any()


SMALL = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "vocab_size": 600,
    "initializer_range": 0.3,
}
MODELS = {
    "llama": {**SMALL, "intermediate_size": 64, "num_key_value_heads": 2},
    "qwen2": {**SMALL, "intermediate_size": 64, "num_key_value_heads": 2},
    "qwen3": {**SMALL, "intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 8},
    "mistral": {**SMALL, "intermediate_size": 64, "num_key_value_heads": 2},
    "gemma2": {**SMALL, "intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 8},
    "phi3": {**SMALL, "intermediate_size": 64, "num_key_value_heads": 2, "pad_token_id": 0},
    "gpt2": {"n_layer": 2, "n_embd": 32, "n_head": 4, "vocab_size": 600, "n_positions": 512, "initializer_range": 0.3},
    "gpt_neox": {**SMALL, "intermediate_size": 64},
}


@pytest.mark.parametrize(("family", "attention"), [*((family, "sdpa") for family in MODELS), ("llama", "eager")])
def test_loss_and_gradients_are_those_of_the_rows_alone(samples, family, attention):
    """The sum over tokens, divided by the same number of targets, once with padding and once packed."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **MODELS[family])
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).double().eval()
    packs = pack(samples, 400)
    assert max(len(each.doc_lengths) for each in packs) > 2
    num_targets = sum(sample.num_targets for sample in samples)
    results = []
    for sequences, length in ((samples, 200), (packs, 400)):
        model.zero_grad()
        batch = collate(sequences, length, 0)
        loss = batch_loss(model, batch, num_targets, divides_sum=takes_num_targets(model))
        loss.backward()
        results.append((loss.item(), [param.grad.clone() for param in model.parameters() if param.grad is not None]))
    (alone, grads_alone), (packed, grads_packed) = results
    assert packed == pytest.approx(alone, rel=1e-6)  # transformers' loss is in fp32
    for one, other in zip(grads_alone, grads_packed, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


def test_without_restarting_positions_the_loss_would_differ(samples):
    """What the test above would miss if the model ignored them."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **MODELS["llama"])).double().eval()
    batch = collate(pack(samples, 400), 400, 0)
    assert batch.position_ids is not None
    with torch.no_grad():
        right = batch_loss(model, batch, 1, divides_sum=True)
        wrong = batch_loss(model, replace(batch, position_ids=None), 1, divides_sum=True)
    assert abs(float(right - wrong)) > 1e-3 * float(right)


def test_weights_scale_each_rows_part_of_the_loss(samples):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **MODELS["llama"])).eval()
    weights = [0.0, 0.5, 2.0]
    rows = [Sample(s.where, s.ids, s.trained, weight=w) for s, w in zip(samples, weights, strict=False)]
    with torch.no_grad():
        alone = [batch_loss(model, collate([row], 200, 0), row.num_targets, divides_sum=True) for row in rows]
        total = sum(row.target_weight for row in rows)
        together = batch_loss(model, collate(rows, 200, 0, with_weights=True), total, divides_sum=True)
        packed = batch_loss(model, collate(pack(rows, 600), 600, 0, with_weights=True), total, divides_sum=True)
    expected = sum(w * row.num_targets * float(nll) for w, row, nll in zip(weights, rows, alone, strict=True)) / total
    assert float(together) == pytest.approx(expected, rel=1e-5)
    assert float(packed) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"attention_mask": True}, "set attention_mask to false"),
        ({"attention": "flash_attention_2", "micro_batch_size": 2}, "needs micro_batch_size 1"),
    ],
)
def test_what_would_let_documents_see_each_other_is_refused(fields, said):
    run = run_from_mapping({"model": "x", "data": {"packing": "best_fit"}, **fields})
    with pytest.raises(DataError, match=said):
        load_data(run, tiny_tokenizer())
