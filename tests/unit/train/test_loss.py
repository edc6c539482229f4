"""Parts of the loss add up to the mean over all tokens, however the batch is cut."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from vramplan.data.batch import IGNORED, Batch
from vramplan.train.loss import batch_loss, takes_num_targets

from support.tiny_model import CONFIG


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**CONFIG, vocab_size=97)).double()


def batch(rows: int) -> Batch:
    torch.manual_seed(rows)
    ids = torch.randint(0, 97, (rows, 12))
    labels = torch.where(torch.rand(rows, 12) < 0.5, ids, IGNORED)
    labels[:, 0], labels[:, 1] = IGNORED, ids[:, 1]
    return Batch(ids, labels, None)


def cut(whole: Batch, start: int, stop: int) -> Batch:
    return Batch(whole.input_ids[start:stop], whole.labels[start:stop], None)


def by_hand(model, whole: Batch) -> float:
    nll = torch.nn.functional.cross_entropy(
        model(input_ids=whole.input_ids).logits[:, :-1].reshape(-1, 97),
        whole.labels[:, 1:].reshape(-1),
        ignore_index=IGNORED,
        reduction="sum",
    )
    return float(nll.detach() / (whole.labels[:, 1:] != IGNORED).sum())


class MeanOnly(torch.nn.Module):
    """A model of the kind whose loss is a mean over its own tokens, whatever it is told."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, input_ids, labels=None, use_cache=None):
        return SimpleNamespace(loss=self.inner(input_ids=input_ids, labels=labels, use_cache=use_cache).loss)


@pytest.mark.parametrize("wrap", [lambda model: model, MeanOnly])
def test_parts_add_up_to_the_mean_over_all_tokens(model, wrap):
    whole, asked = batch(6), wrap(model)
    num_targets = int((whole.labels[:, 1:] != IGNORED).sum())
    divides_sum = takes_num_targets(asked)
    assert divides_sum is (wrap is not MeanOnly)
    expected = by_hand(model, whole)
    for sizes in ((6,), (1, 5), (2, 2, 2)):
        start, total = 0, 0.0
        for size in sizes:
            part = batch_loss(asked, cut(whole, start, start + size), num_targets, divides_sum=divides_sum)
            start, total = start + size, total + float(part.detach())
        assert total == pytest.approx(expected, rel=1e-6)


def test_the_mask_reaches_the_model(model):
    whole = batch(2)
    mask = torch.ones_like(whole.input_ids)
    mask[:, :4] = 0
    masked = batch_loss(model, Batch(whole.input_ids, whole.labels, mask), 1, divides_sum=True)
    assert float(masked) != pytest.approx(float(batch_loss(model, whole, 1, divides_sum=True)))
