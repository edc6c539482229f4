from __future__ import annotations

import numpy as np
import torch

from vramplan.data.batch import IGNORED, collate, padded_length
from vramplan.data.sample import Sample


def sample(ids: list[int], trained: list[bool]) -> Sample:
    return Sample("w", np.array(ids), np.array(trained))


def test_padding_is_on_the_right_and_never_learnt():
    batch = collate([sample([5, 6, 7], [False, True, True]), sample([8, 9], [True, True])], 4, pad_id=1, with_mask=True)
    assert batch.input_ids.tolist() == [[5, 6, 7, 1], [8, 9, 1, 1]]
    assert batch.labels.tolist() == [[IGNORED, 6, 7, IGNORED], [IGNORED, 9, IGNORED, IGNORED]]
    assert batch.attention_mask is not None
    assert batch.attention_mask.tolist() == [[1, 1, 1, 0], [1, 1, 0, 0]]
    assert collate([sample([1], [True])], 1, 0).attention_mask is None


def test_learnt_tokens_are_counted_as_the_loss_counts_them():
    one = sample([5, 6, 7], [True, True, False])
    labels = collate([one], 8, 0).labels
    assert one.num_targets == int((labels[:, 1:] != IGNORED).sum()) == 1


def test_length_is_rounded_up_but_not_beyond_the_sequence():
    samples = [sample([1] * 13, [True] * 13)]
    assert padded_length(samples, 100) == 16
    assert padded_length(samples, 14) == 14


def test_moving_keeps_everything():
    batch = collate([sample([1, 2], [True, True])], 2, 0, with_mask=True).to(torch.device("cpu"))
    assert batch.attention_mask is not None
    assert batch.input_ids.tolist() == [[1, 2]]
