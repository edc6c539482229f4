"""Samples -> the tensors of one forward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vramplan.data.encode import Sample

IGNORED = -100
"""Label of a token that is not in the loss (torch's ``ignore_index``)."""


@dataclass(frozen=True, slots=True)
class Batch:
    """``input_ids`` and ``labels`` (batch, length), int64; ``attention_mask`` (batch, length), 1 where a token is.

    Sequences are padded on the right. Under causal attention no real token sees a padded one, so the mask changes
    nothing and may be left out (``None``).
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    attention_mask: torch.Tensor | None

    def inputs(self) -> dict[str, Any]:
        """What the model's forward is given besides the labels."""
        given: dict[str, Any] = {"input_ids": self.input_ids, "use_cache": False}
        if self.attention_mask is not None:
            given["attention_mask"] = self.attention_mask
        return given

    def to(self, device: torch.device) -> Batch:
        mask = self.attention_mask
        return Batch(
            self.input_ids.to(device, non_blocking=True),
            self.labels.to(device, non_blocking=True),
            None if mask is None else mask.to(device, non_blocking=True),
        )


def collate(samples: Sequence[Sample], length: int, pad_id: int, *, with_mask: bool = False) -> Batch:
    """The samples padded to ``length`` tokens each."""
    shape = (len(samples), length)
    input_ids = torch.full(shape, pad_id, dtype=torch.int64)
    labels = torch.full(shape, IGNORED, dtype=torch.int64)
    mask = torch.zeros(shape, dtype=torch.int64)
    for row, sample in enumerate(samples):
        ids = torch.from_numpy(sample.ids)
        input_ids[row, : len(ids)] = ids
        labels[row, : len(ids)] = ids.masked_fill(~torch.from_numpy(sample.trained), IGNORED)
        mask[row, : len(ids)] = 1
    labels[:, 0] = IGNORED  # nothing precedes the first token
    return Batch(input_ids, labels, mask if with_mask else None)


def padded_length(samples: Sequence[Sample], seq_len: int, multiple: int = 8) -> int:
    """The longest sample's length, rounded up to a ``multiple`` that matrix units like, at most ``seq_len``."""
    longest = max(sample.num_tokens for sample in samples)
    return min(seq_len, -(-longest // multiple) * multiple)
