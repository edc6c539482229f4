"""A short run of the worst batch that the data holds, by the real ranks, before the real run: what it takes, measured.

Two optimizer steps of two micro-batches (the second meets accumulated gradients, the second step meets the optimizer's
states), an evaluation and a save. Nothing of it is kept but the bytes.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Any

from vramplan.data.sample import Sample
from vramplan.search.plan import Plan
from vramplan.search.recalibrate import eval_batch
from vramplan.train.evaluate import evaluate
from vramplan.train.loop import GlobalBatch, Loop
from vramplan.train.model import count_parameters
from vramplan.train.phases import PROBED_STEPS
from vramplan.train.record import Recorder

_MICRO_BATCHES = 2


class ProbeLoop(Loop):
    """A loop whose every global batch is made of the longest samples, and is as small as shows the peak."""

    def _global_batch(self, step: int) -> GlobalBatch:
        micro_batches = min(_MICRO_BATCHES, self.run.grad_accum_steps or 1)
        ids = _longest(self.data.train, micro_batches * (self.run.micro_batch_size or 1) * self.engine.dp_degree)
        samples = [self.data.train[index] for index in ids]
        num_targets = sum(sample.num_targets for sample in samples)
        num_tokens = sum(sample.num_tokens for sample in samples)
        return GlobalBatch(ids, self.run.seq_len, num_targets, num_targets, num_tokens)

    def _last_micro(self, step: int) -> str:
        return f"step{step + 1}.micro{min(_MICRO_BATCHES, self.run.grad_accum_steps or 1)}"

    def evaluate_longest(self) -> None:
        """A forward on every rank of the longest held-out samples."""
        held_out = [sample for samples in self._sets.values() for sample in samples]
        chosen = [held_out[index] for index in _longest(held_out, eval_batch(self.run) * self.engine.dp_degree)]
        with self.phases.phase("evaluation", PROBED_STEPS):
            evaluate(self.engine, chosen, self._pad_id)
        self.phases.evaluated("evaluation", self.engine.take_largest_evaluated())


def run_probe(loop: ProbeLoop, plan: Plan, config: dict[str, Any]) -> None:
    """Runs it and writes the record; every rank calls. ``config``: fields of the model's ``config.json``."""
    loop.mining = None  # losses of a probe teach nothing
    seconds = [loop.step(step).seconds for step in range(PROBED_STEPS)]
    if loop.has_held_out:
        loop.evaluate_longest()
    loop.save(PROBED_STEPS)
    loop.phases.stop_measuring()
    Recorder(plan, loop.run_dir, config, loop.phases, count_parameters(loop.engine.module)).write(seconds[-1])
    loop.metrics.event("end", step=PROBED_STEPS, exported="nothing")
    loop.metrics.close()


def _longest(samples: Sequence[Sample], count: int) -> tuple[int, ...]:
    """Ids of the longest samples, longest first; from the start again where there are too few."""
    best = heapq.nlargest(count, range(len(samples)), key=lambda index: samples[index].num_tokens)
    return tuple(best[place % len(best)] for place in range(count))
