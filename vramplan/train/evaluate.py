"""The loss on held-out samples, weighted by tokens, computed by all ranks together."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from vramplan.data.batch import Batch, collate, padded_length
from vramplan.data.sample import Sample
from vramplan.data.sampler import micro_batches
from vramplan.train.engine import TrainEngine
from vramplan.train.progress import tell


@dataclass(frozen=True, slots=True)
class Evaluation:
    """``loss``: mean negative log-likelihood of all target tokens, in nats."""

    loss: float
    num_targets: int

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))  # beyond it a float overflows


def evaluate(
    engine: TrainEngine, samples: Sequence[Sample], pad_id: int, micro_batch_size: int | None = None
) -> Evaluation:
    """The loss over ``samples``, each counted once however many ranks there are; ``micro_batch_size``: over the
    run's own."""
    run = engine.run
    size = micro_batch_size or run.training.eval_micro_batch_size or run.micro_batch_size or 1
    total = torch.zeros((), dtype=torch.float64, device=engine.device)
    with engine.evaluating():
        for batch, counts in _batches(engine, samples, pad_id, size):
            summed_nll = engine.forward(engine.own_stretch(batch), target_weight=1)
            if counts:
                total += summed_nll
            tell()
    num_targets = sum(sample.num_targets for sample in samples)
    (summed,) = engine.sum_over_ranks(total)
    return Evaluation(summed / num_targets, num_targets)


def _batches(
    engine: TrainEngine, samples: Sequence[Sample], pad_id: int, micro_batch_size: int
) -> Iterator[tuple[Batch, bool]]:
    """The batches of this rank's group, and whether each counts. All ranks have as many, for ZeRO-3 gathers weights in
    each forward: a group that has run out of samples computes one along."""
    run = engine.run
    rounds = -(-len(samples) // engine.dp_degree)
    mine = [index * engine.dp_degree + engine.dp_rank for index in range(rounds)]
    for chunk in micro_batches(mine, micro_batch_size):
        present = [samples[index] for index in chunk if index < len(samples)]
        shown = present or [samples[-1]]
        length = padded_length(shown, run.seq_len, engine.length_multiple)
        yield collate(shown, length, pad_id, with_mask=run.attention_mask), bool(present)
