"""What keeps a model from forgetting, tied to a rank's engine: springs, a frozen copy, and both in a played run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from vramplan.retain.anchored import AnchoredPenalties
from vramplan.retain.base_model import BaseModel
from vramplan.retain.kl import kl_to_base
from vramplan.spec.run import RunSpec
from vramplan.spec.trainable import FullMethod, LoraMethod

IGNORED = -100
"""Label of a token that is no target."""


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


def needs_copy(run: RunSpec) -> bool:
    """Whether KL asks a frozen copy of the base: adapters are switched off instead."""
    return run.retain.kl is not None and not isinstance(run.method, LoraMethod)


def plain_base(run: RunSpec) -> RunSpec:
    """The run whose model is the base as it is loaded: whole, without new blocks, checkpointing or other kernels."""
    plain = {"method": FullMethod(), "activation_checkpointing": "none", "loss": "hf", "kernels": "hf"}
    return run.model_copy(update={**plain, "tiled_mlp": False})


def frozen_copy(run: RunSpec, module: Any, config: dict[str, Any], device: Any) -> Any:
    """The base model, ready to be asked: on the device; under ZeRO-3 an engine of its own, which keeps this rank's part
    of each weight. ``config``: DeepSpeed's of the run."""
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


@dataclass
class PlayedRetention:
    """The trainer's hooks in a played run (``train/engine.py``): springs pull in the last micro-batch of a step, the
    base is asked before every forward, and the Fisher diagonal is sampled before the first step."""

    run: RunSpec
    world_size: int
    springs: AnchoredPenalties | None
    """Made before the engine, so that their hooks run first."""
    base: BaseModel | None = None
    """Made after it."""

    @property
    def samples_fisher(self) -> bool:
        return self.springs is not None and self.run.retain.ewc is not None

    def base_logits(self, batch: dict[str, Any]) -> torch.Tensor | None:
        """What the base says to a batch; None without KL."""
        if self.base is None:
            return None
        return self.base.logits({name: value for name, value in batch.items() if name != "labels"})

    def divergence(self, logits: torch.Tensor, base_logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The KL term of a micro-batch, weighed."""
        assert self.run.retain.kl is not None
        counted = torch.nn.functional.pad(labels, (0, 1), value=IGNORED)[:, 1:] != IGNORED
        return kl_to_base(logits, base_logits, counted) * (self.run.retain.kl.weight / labels.numel())

    def before_backward(self, *, is_last: bool) -> None:
        if self.springs is not None:
            self.springs.gradient_scale = float(self.world_size) if is_last else 0.0
            self.springs.penalty = 0.0

    def num_samples(self) -> int:
        """Samples played: this rank's, two at most, for the third is as the second."""
        ewc = self.run.retain.ewc
        return 0 if ewc is None else min(2, -(-ewc.samples // self.world_size))
