"""Which elements of a trained parameter a rank looks after, so that its state is kept once over all ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from vramplan.spec.layout import shard


@dataclass(frozen=True, slots=True)
class Shard:
    """A flat slice of one parameter: elements ``start`` to ``end`` (exclusive) are this rank's."""

    start: int
    end: int

    @property
    def numel(self) -> int:
        return self.end - self.start

    def of_gradient(self, grad: torch.Tensor) -> torch.Tensor:
        """The slice of a whole gradient, flat."""
        return grad.reshape(-1)[self.start : self.end]

    def of_weights(self, param: Any) -> torch.Tensor:
        """The slice of the weights, flat; of a weight that ZeRO-3 split it is the part that the rank has anyway."""
        if hasattr(param, "ds_tensor"):
            kept: torch.Tensor = param.ds_tensor.data
            return kept.reshape(-1)[: self.numel]
        flat: torch.Tensor = param.detach().reshape(-1)
        return flat[self.start : self.end]


def shard_of(param: Any, rank: int, world_size: int) -> Shard:
    """This rank's slice: as ZeRO-3 cuts where it does (``ds_tensor``), else an equal share of every parameter."""
    numel = getattr(param, "ds_numel", param.numel())
    each = shard(numel, world_size)
    if hasattr(param, "ds_tensor") and param.ds_persist:
        each = max(each, 1)  # split all the same: persistence only keeps the gathered copy
    start = min(rank * each, numel)
    return Shard(start, min(start + each, numel))
