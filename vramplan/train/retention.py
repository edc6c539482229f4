"""What keeps the model from forgetting, as training starts: the Fisher diagonal, a frozen copy of the base."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vramplan.data.batch import collate, padded_length
from vramplan.data.dataset import read_samples
from vramplan.data.sample import Sample
from vramplan.rank.retention import frozen_copy, needs_copy
from vramplan.spec.run import RunSpec
from vramplan.train.progress import tell

if TYPE_CHECKING:
    from vramplan.train.engine import TrainEngine


def general_samples(run: RunSpec, tokenizer: Any) -> list[Sample]:
    """What the Fisher diagonal is estimated from; nothing without EWC."""
    ewc = run.retain.ewc
    if ewc is None:
        return []
    return read_samples(ewc.data, run, tokenizer)[: ewc.samples]


def start_penalties(engine: TrainEngine, samples: Sequence[Sample], pad_id: int) -> None:
    """Anchors the weights as they are and estimates the Fisher diagonal; every rank calls, before resuming."""
    if engine.penalties is None:
        return
    engine.penalties.anchor()
    if engine.run.retain.ewc is None:
        return
    run, world_size = engine.run, engine.world_size
    with engine.sampling_fisher():
        for start in range(0, len(samples), world_size):
            index = start + engine.rank  # a rank that has run out computes one along and counts nothing
            sample = samples[min(index, len(samples) - 1)]
            batch = collate([sample], padded_length([sample], run.seq_len), pad_id, with_mask=run.attention_mask)
            engine.penalties.begin_sample(world_size * engine.loss_scale(), counts=index < len(samples))
            engine.backward(engine.forward(batch.to(engine.device), sample.num_targets, is_last=False))
            tell()
    engine.penalties.end_samples()


def reference_model(run: RunSpec, directory: Path, config: dict[str, Any], device: Any) -> Any | None:
    """A frozen copy of the base model for KL; None where it is not needed (adapters can be switched off).

    Under ZeRO-3 it is an engine of its own, which keeps this rank's part of each weight.
    """
    if not needs_copy(run):
        return None
    from vramplan.train.model import pretrained

    return frozen_copy(run, pretrained(run, directory), config, device)
