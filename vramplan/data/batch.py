"""Samples -> the tensors of one forward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vramplan.data.sample import Sample

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
    position_ids: torch.Tensor | None = None
    """(batch, length), int64, restarting with every document of a pack: transformers then lets no document attend to
    another (masking_utils.py, ``find_packed_sequence_indices``; flash attention reads lengths from them)."""
    weights: torch.Tensor | None = None
    """(batch, length), fp32: what each target counts in the loss; None: 1."""
    next_labels: torch.Tensor | None = None
    """(batch, length), int64: the label that each place predicts, where this is a stretch of sequences: that of the
    last place lies in the next stretch. ``weights`` then lie at the places that predict too. None: whole sequences."""
    targets_of_rows: torch.Tensor | None = None
    """(batch,), int64: targets of each whole sequence; given with ``next_labels``."""

    def predicted(self) -> torch.Tensor:
        """(batch, length): the label that each place predicts, ``IGNORED`` where that is not in the loss."""
        if self.next_labels is not None:
            return self.next_labels
        return _shifted(self.labels, IGNORED)

    def inputs(self) -> dict[str, Any]:
        """What the model's forward is given besides the labels."""
        given: dict[str, Any] = {"input_ids": self.input_ids, "use_cache": False}
        if self.attention_mask is not None:
            given["attention_mask"] = self.attention_mask
        if self.position_ids is not None:
            given["position_ids"] = self.position_ids
        return given

    def to(self, device: torch.device) -> Batch:
        def moved(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor.to(device, non_blocking=True)

        return Batch(
            self.input_ids.to(device, non_blocking=True),
            self.labels.to(device, non_blocking=True),
            moved(self.attention_mask),
            moved(self.position_ids),
            moved(self.weights),
            moved(self.next_labels),
            moved(self.targets_of_rows),
        )

    def stretch(self, index: int, count: int) -> Batch:
        """The ``index``-th of ``count`` equal stretches of every sequence, with its places in the whole ones; the batch
        itself where there is one. The length has to be a multiple of ``count``."""
        if count == 1:
            return self
        length = self.labels.shape[1]
        positions = torch.arange(length).repeat(len(self.labels), 1) if self.position_ids is None else self.position_ids
        own = slice(index * length // count, (index + 1) * length // count)

        def cut(tensor: torch.Tensor) -> torch.Tensor:
            return tensor[:, own].contiguous()

        return Batch(
            cut(self.input_ids),
            cut(self.labels),
            None if self.attention_mask is None else cut(self.attention_mask),
            cut(positions),
            None if self.weights is None else cut(_shifted(self.weights, 0.0)),
            cut(self.predicted()),
            (self.labels != IGNORED).sum(1),
        )


def _shifted(tensor: torch.Tensor, fill: float) -> torch.Tensor:
    """What lies one place further on."""
    return torch.nn.functional.pad(tensor, (0, 1), value=fill)[:, 1:]


def collate(
    samples: Sequence[Sample], length: int, pad_id: int, *, with_mask: bool = False, with_weights: bool = False
) -> Batch:
    """The samples padded to ``length`` tokens each; positions are given where a sample is a pack."""
    shape = (len(samples), length)
    input_ids = torch.full(shape, pad_id, dtype=torch.int64)
    labels = torch.full(shape, IGNORED, dtype=torch.int64)
    mask = torch.zeros(shape, dtype=torch.int64)
    for row, sample in enumerate(samples):
        size = sample.num_tokens
        ids = torch.from_numpy(sample.ids)
        input_ids[row, :size] = ids if sample.shown is None else torch.from_numpy(sample.shown)
        labels[row, :size] = ids.masked_fill(~torch.from_numpy(sample.trained), IGNORED)
        mask[row, :size] = 1
    labels[:, 0] = IGNORED  # nothing precedes the first token
    return Batch(
        input_ids,
        labels,
        mask if with_mask else None,
        _positions(samples, length) if any(sample.doc_lengths for sample in samples) else None,
        _weights(samples, length) if with_weights else None,
    )


def padded_length(samples: Sequence[Sample], seq_len: int, multiple: int = 8) -> int:
    """The longest sample's length, rounded up to a ``multiple`` that matrix units like, at most ``seq_len``."""
    longest = max(sample.num_tokens for sample in samples)
    return min(seq_len, -(-longest // multiple) * multiple)


def _positions(samples: Sequence[Sample], length: int) -> torch.Tensor:
    """Padding is a document of its own."""
    positions = torch.arange(length).repeat(len(samples), 1)
    for row, sample in enumerate(samples):
        positions[row, : sample.num_tokens] = torch.from_numpy(sample.positions)
        positions[row, sample.num_tokens :] -= sample.num_tokens
    return positions


def _weights(samples: Sequence[Sample], length: int) -> torch.Tensor:
    weights = torch.zeros((len(samples), length), dtype=torch.float32)
    for row, sample in enumerate(samples):
        weights[row, : sample.num_tokens] = torch.from_numpy(sample.weights)
    return weights
