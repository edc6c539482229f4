"""MLPs that take a stretch of each sequence at a time (deepspeed/runtime/sequence_parallel/ulysses_sp.py, TiledMLP)."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch

from vramplan.errors import SpecError
from vramplan.spec.run import RunSpec


def tile_mlps(model: torch.nn.Module, run: RunSpec) -> None:
    """Gives every MLP with Llama's three projections a forward that takes stretches as long as the model is wide.

    Raises:
        SpecError: the model has no such MLP.
    """
    found: list[Any] = [module for module in model.modules() if _is_gated(module)]
    if not found:
        raise SpecError(f"tiled_mlp: {run.model} has no MLP of gate_proj, up_proj and down_proj; leave it out")
    positions = run.seq_len // (run.layout.sp if run.layout is not None else 1)
    for module in found:
        module.forward = MethodType(_tiled(-(-positions // module.down_proj.out_features)), module)


def _is_gated(module: torch.nn.Module) -> bool:
    names = ("gate_proj", "up_proj", "down_proj")
    return all(isinstance(getattr(module, name, None), torch.nn.Linear) for name in names)


def _tiled(num_stretches: int) -> Any:
    """The forward of an MLP in that many stretches, whatever the batch: all ranks gather its weights as often. A batch
    too short for them (``torch.chunk`` would make fewer) is padded."""
    from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledMLP

    def whole(self: Any, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return result

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        weights = [self.down_proj.weight, self.gate_proj.weight, self.up_proj.weight]
        length = x.shape[-2]
        each = -(-length // num_stretches)
        if -(-length // each) < num_stretches:
            x = torch.nn.functional.pad(x, (0, 0, 0, num_stretches * each - length))
        result: torch.Tensor = TiledMLP.apply(whole, self, x, num_stretches, weights)
        return result[..., :length, :] if result.shape[-2] > length else result

    return forward
