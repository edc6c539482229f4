from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from vramplan.data.augment import add_embedding_noise, token_dropout
from vramplan.data.batch import collate
from vramplan.data.encode import encode_rows
from vramplan.data.source import read_rows
from vramplan.train.loss import batch_loss

from support.tiny_model import tiny_tokenizer


@pytest.fixture(scope="module")
def samples():
    return encode_rows(read_rows("builtin:arithmetic")[:50], tiny_tokenizer(), 200)


def test_dropped_tokens_are_shown_as_another_and_stay_targets(samples):
    tokenizer = tiny_tokenizer()
    dropout = token_dropout(0.25, tokenizer, seed=3)
    special = set(tokenizer.all_special_ids)
    num_dropped = num_ordinary = 0
    for index, sample in enumerate(samples):
        shown = dropout.apply(sample, 7, index)
        plain, changed = collate([sample], 200, 0), collate([shown], 200, 0)
        assert torch.equal(plain.labels, changed.labels)
        differs = shown.shown != sample.ids
        assert (shown.shown[differs] == tokenizer.pad_token_id).all()
        assert not any(int(token) in special for token in sample.ids[differs])
        num_dropped += int(differs.sum())
        num_ordinary += sum(int(token) not in special for token in sample.ids)
    assert num_dropped / num_ordinary == pytest.approx(0.25, abs=4 * math.sqrt(0.25 * 0.75 / num_ordinary))


def test_what_is_dropped_depends_on_step_and_sample_alone(samples):
    dropout = token_dropout(0.3, tiny_tokenizer(), seed=3)
    first = dropout.apply(samples[0], 7, 0).shown
    assert np.array_equal(first, dropout.apply(samples[0], 7, 0).shown)
    assert not np.array_equal(first, dropout.apply(samples[0], 8, 0).shown)
    assert token_dropout(0.0, tiny_tokenizer(), seed=3) is None


def test_embedding_noise_is_bounded_in_training_only(samples):
    config = AutoConfig.for_model(
        "llama", hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=600
    )
    model = AutoModelForCausalLM.from_config(config)
    ids = collate(samples[:4], 120, 0).input_ids
    embeddings = model.get_input_embeddings()
    clean = embeddings(ids).detach()
    handle = add_embedding_noise(model, alpha=5.0)
    bound = 5.0 / math.sqrt(120 * 32)
    torch.manual_seed(1)
    noise = (embeddings(ids) - clean).detach()
    assert 0.99 * bound < noise.abs().max() <= bound * (1 + 1e-5)
    assert float(noise.std()) == pytest.approx(bound / math.sqrt(3), rel=0.02)  # of a uniform distribution
    torch.manual_seed(1)
    assert torch.equal((embeddings(ids) - clean).detach(), noise)
    with torch.no_grad():
        assert torch.equal(embeddings(ids), clean)
    model.eval()
    assert torch.equal(embeddings(ids).detach(), clean)
    handle.remove()
    model.train()
    loss = batch_loss(model, collate(samples[:4], 120, 0), 100, divides_sum=True)
    assert torch.isfinite(loss)
