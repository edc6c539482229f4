"""What keeps the model from forgetting, tied to the engine: penalties, rates by layer, the Fisher diagonal, a copy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vramplan.data.batch import collate, padded_length
from vramplan.data.dataset import read_samples
from vramplan.data.sample import Sample
from vramplan.retain.anchored import AnchoredPenalties
from vramplan.spec.run import RunSpec
from vramplan.spec.trainable import LoraMethod

if TYPE_CHECKING:
    from vramplan.train.engine import TrainEngine


def anchored_penalties(run: RunSpec, module: Any, rank: int, world_size: int) -> AnchoredPenalties | None:
    """The springs that the run asks for; None where it asks for none."""
    l2sp, ewc = run.retain.l2sp, run.retain.ewc
    if l2sp is None and ewc is None:
        return None
    return AnchoredPenalties(
        module,
        rank,
        world_size,
        l2sp_weight=l2sp.weight if l2sp is not None else 0.0,
        ewc_weight=ewc.weight if ewc is not None else 0.0,
        max_stiffness=ewc.max_stiffness if ewc is not None else math.inf,
    )


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
    engine.penalties.end_samples()


def reference_model(run: RunSpec, directory: Path, config: dict[str, Any], device: Any) -> Any | None:
    """A frozen copy of the base model for KL; None where it is not needed (adapters can be switched off).

    Under ZeRO-3 it is an engine of its own, which keeps this rank's part of each weight.
    """
    if run.retain.kl is None or isinstance(run.method, LoraMethod):
        return None
    from vramplan.train.model import pretrained

    module = pretrained(run, directory)
    if run.zero.stage != 3:
        return module.to(device)
    import deepspeed

    kept = ("train_micro_batch_size_per_gpu", "zero_optimization", "bf16", "fp16", "torch_autocast")
    frozen = {name: value for name, value in config.items() if name in kept}
    frozen["zero_optimization"] = {
        name: value for name, value in config["zero_optimization"].items() if name != "offload_optimizer"
    }
    engine, *_ = deepspeed.initialize(model=module.requires_grad_(False), config=frozen)
    return engine
