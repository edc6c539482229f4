"""The hook of L2-SP and EWC: adds their gradients to the training loss's, each rank to its own slice of each parameter.

What is kept (starting weights, Fisher diagonal) is kept once over all ranks under every ZeRO stage. The reduction that
averages gradients over the ranks then brings every slice to all of them, so a slice is added times the ranks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from vramplan.retain.ewc import ewc_penalty
from vramplan.retain.l2sp import l2sp_penalty
from vramplan.retain.shards import Shard, shard_of


@dataclass(slots=True)
class _Kept:
    """One parameter's slice on this rank: ``start`` in the weights' format, ``fisher`` in fp32."""

    param: Any
    shard: Shard
    start: torch.Tensor
    fisher: torch.Tensor | None = None


@dataclass
class AnchoredPenalties:
    """Springs that pull each trained parameter to where it was when ``anchor`` was called.

    Made before DeepSpeed's engine, so that its hooks on ``param.grad`` run after ours.
    """

    module: Any
    rank: int
    world_size: int
    l2sp_weight: float = 0.0
    ewc_weight: float = 0.0
    max_stiffness: float = math.inf
    """Of the Fisher diagonal, in units of its mean; see ``retain/ewc.py``."""
    gradient_scale: float = 0.0
    """What the training loss was multiplied with in this backward, ranks included; 0: this backward adds nothing."""
    penalty: float = 0.0
    """This rank's part of the penalty in the last backward that added it."""
    _kept: dict[str, _Kept] = field(default_factory=dict)
    _sampling: bool = False
    _counts: bool = False

    def __post_init__(self) -> None:
        for name, param in self.module.named_parameters():
            if param.requires_grad:
                param.register_post_accumulate_grad_hook(lambda param, name=name: self._on_gradient(name, param))

    def anchor(self) -> None:
        """Keeps the weights as they are now."""
        for name, param in self.module.named_parameters():
            if param.requires_grad:
                shard = shard_of(param, self.rank, self.world_size)
                self._kept[name] = _Kept(param, shard, shard.of_weights(param).clone())

    def begin_sample(self, loss_scale: float, *, counts: bool) -> None:
        """The next backward's gradient, divided by ``loss_scale``, is a sample for the Fisher diagonal, if it
        ``counts``; nothing of it reaches the optimizer."""
        self._sampling, self._counts, self.gradient_scale = True, counts, loss_scale
        for kept in self._kept.values():
            if kept.fisher is None:
                kept.fisher = torch.zeros_like(kept.start, dtype=torch.float32)

    def end_samples(self) -> None:
        """Scales the diagonal to a mean of 1 over all trained parameters, cut at ``max_stiffness`` means."""
        self._sampling, self.gradient_scale = False, 0.0
        for kept in self._kept.values():
            kept.param.grad = None
        mean = self._mean_fisher()
        for kept in self._kept.values():
            kept.fisher = kept.fisher.clamp_(max=self.max_stiffness * mean) if kept.fisher is not None else None
        mean = self._mean_fisher()
        for kept in self._kept.values():
            if kept.fisher is not None and mean > 0:
                kept.fisher /= mean

    def _mean_fisher(self) -> float:
        """Over all trained parameters and ranks."""
        sums = torch.zeros(2, dtype=torch.float64)
        for kept in self._kept.values():
            assert kept.fisher is not None
            sums += torch.tensor([float(kept.fisher.sum(dtype=torch.float64)), kept.shard.numel], dtype=torch.float64)
        sums = sums.to(next(iter(self._kept.values())).start.device)
        dist.all_reduce(sums)
        return float(sums[0] / sums[1])

    def fisher(self, name: str) -> torch.Tensor | None:
        """This rank's slice of the Fisher diagonal of a parameter."""
        return self._kept[name].fisher

    def kept_tensors(self) -> list[torch.Tensor]:
        """What this rank keeps between steps."""
        return [tensor for kept in self._kept.values() for tensor in (kept.start, kept.fisher) if tensor is not None]

    def state_bytes(self) -> int:
        """Bytes that this rank keeps between steps."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.kept_tensors())

    def _on_gradient(self, name: str, param: Any) -> None:
        kept = self._kept.get(name)
        if kept is None or not self.gradient_scale:
            return
        if self._sampling:
            self._take_sample(kept, param.grad)
        else:
            self._pull(kept, param)

    def _take_sample(self, kept: _Kept, grad: torch.Tensor) -> None:
        squares = (grad.float() / self.gradient_scale).square_() * float(self._counts)
        dist.all_reduce(squares)
        assert kept.fisher is not None
        kept.fisher += kept.shard.of_gradient(squares).to(kept.fisher.device)
        grad.zero_()

    def _pull(self, kept: _Kept, param: Any) -> None:
        distance = kept.shard.of_weights(param).float() - kept.start.float()
        pull = torch.zeros_like(distance)
        if self.l2sp_weight:
            penalty, more = l2sp_penalty(distance, self.l2sp_weight)
            pull, self.penalty = pull + more, self.penalty + float(penalty)
        if self.ewc_weight and kept.fisher is not None:
            penalty, more = ewc_penalty(distance, kept.fisher, self.ewc_weight)
            pull, self.penalty = pull + more, self.penalty + float(penalty)
        flat = param.grad.view(-1)[kept.shard.start : kept.shard.end]
        flat.add_(pull.to(flat.device, flat.dtype), alpha=self.gradient_scale)
