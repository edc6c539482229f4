"""What a run is trained on, as plain data for a report: sources, lengths, and examples cut where training begins."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from vramplan.data.dataset import RunData, load_data, with_eval_sets
from vramplan.data.forms import CHAT_FORMS
from vramplan.data.sample import Sample
from vramplan.data.template import DEFAULT_TEMPLATE
from vramplan.spec.run import RunSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def describe_data(run: RunSpec, tokenizer: PreTrainedTokenizerBase, num_examples: int) -> dict[str, Any]:
    """Sources with their shares, lengths, notes, the held-out sets, and the first sequences of the first steps.

    Raises:
        DataError: as ``load_data``, also of ``data.eval_sets``.
    """
    data, eval_sets = with_eval_sets(load_data(run, tokenizer), run, tokenizer)
    lengths = data.lengths
    return {
        "parts": [
            {
                "name": part.name,
                "forms": list(data.forms[part.name]),
                "num_sequences": part.size,
                "share": float(part.share),
                "is_replay": part.is_replay,
            }
            for part in data.stream.parts
        ],
        "num_held_out": len(data.held_out),
        "num_held_out_replay": len(data.held_out_replay),
        "eval_sets": {name: len(samples) for name, samples in eval_sets.items()},
        "lengths": {**asdict(lengths), "planned_seq_len": lengths.planned_seq_len},
        "padding_frac": padding_frac(run, data),
        "template": _template(data, tokenizer),
        "notes": list(data.notes),
        "examples": [_example(data.train[index], tokenizer) for index in _first_seen(data, num_examples)],
    }


def _template(data: RunData, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Whose template renders the turns; None where no row that was read has any."""
    if CHAT_FORMS.isdisjoint(form for forms in data.forms.values() for form in forms):
        return None
    return "stated default" if tokenizer.chat_template == DEFAULT_TEMPLATE else "tokenizer's"


def padding_frac(run: RunSpec, data: RunData, most_steps: int = 2000) -> float:
    """Share of padding in the first epoch (of its first ``most_steps`` steps): each global batch is padded to its own
    longest sequence. Batches are those of one rank where the spec names no global batch."""
    from vramplan.data.batch import padded_length

    batch_size = run.global_batch_size or run.micro_batch_size or 1
    sizes = np.asarray([sample.num_tokens for sample in data.train])
    num_real = num_padded = 0
    for step in range(min(most_steps, math.ceil(len(sizes) / batch_size))):
        ids = list(data.stream.batch(step, batch_size))
        num_real += int(sizes[ids].sum())
        num_padded += batch_size * padded_length([data.train[index] for index in ids], run.seq_len)
    return 1 - num_real / num_padded


def _first_seen(data: RunData, count: int) -> list[int]:
    seen: dict[int, None] = {}
    step = 0
    while len(seen) < min(count, len(data.train)) and step < 10 * count:
        seen.update(dict.fromkeys(data.stream.batch(step, max(1, count))))
        step += 1
    return list(seen)[:count]


def _example(sample: Sample, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    return {
        "where": sample.where,
        "num_tokens": sample.num_tokens,
        "num_targets": sample.num_targets,
        "pieces": list(pieces(sample, tokenizer)),
    }


def pieces(sample: Sample, tokenizer: PreTrainedTokenizerBase) -> Iterator[dict[str, Any]]:
    """The sequence as decoded stretches that are trained, or not; a pack's documents begin stretches of their own."""
    starts = set(np.cumsum(sample.doc_lengths)[:-1].tolist()) if sample.doc_lengths else set()
    edges = [0, *(np.flatnonzero(np.diff(sample.trained)) + 1).tolist(), sample.num_tokens]
    edges = sorted(set(edges) | starts)
    for start, end in pairwise(edges):
        text = tokenizer.decode(sample.ids[start:end])
        yield {"text": text, "trained": bool(sample.trained[start]), "begins_document": start in starts}
