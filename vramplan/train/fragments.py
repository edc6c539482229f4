"""The fp32 weights and moments of an engine by the names of its parameters, whichever ZeRO stage holds them.

DeepSpeed's own getters (utils/tensor_fragment.py) know nothing of stage 0, gather every parameter on every rank and
need moments that exist already; here a rank sees which elements of which parameter it holds, and where.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vramplan.spec.run import OptimizerSpec
from vramplan.train.engine import TrainEngine

_MOMENTS = {
    "adamw": ("exp_avg", "exp_avg_sq"),
    "adamw_torch": ("exp_avg", "exp_avg_sq"),
    "adamw_torch_fused": ("exp_avg", "exp_avg_sq"),
    "lion": ("exp_avg",),
    "sgd": (),
}
COUNTING = frozenset({"adamw", "adamw_torch", "adamw_torch_fused", "lion"})
"""Optimizers that count their steps."""


def moments_of(optimizer: OptimizerSpec) -> tuple[str, ...] | None:
    """What is kept of each weight, element by element in fp32, and how it is named in the optimizer's state; None for
    an optimizer that keeps it otherwise. Those with the same names are implementations of the same arithmetic."""
    if optimizer.kind == "sgd" and optimizer.momentum:
        return ("momentum_buffer",)
    return _MOMENTS.get(optimizer.kind)


@dataclass(frozen=True, slots=True)
class Fragment:
    """Elements ``start`` to ``start + numel`` of a parameter lie at ``offset`` of the flat master ``flat``."""

    flat: int
    offset: int
    start: int
    numel: int


@dataclass(frozen=True, slots=True)
class Holdings:
    """What one rank holds of the training state."""

    masters: Sequence[torch.Tensor]
    """fp32 weights that the optimizer steps, as DeepSpeed numbers them; one is flat, or a whole parameter."""
    shapes: dict[str, tuple[int, ...]]
    """Every trained parameter of the model."""
    fragments: dict[str, Fragment]
    """Parameters of which this rank holds a part."""
    optimizer: Any
    """The optimizer inside DeepSpeed's wrappers, whose ``state`` is kept by master."""


def holdings(engine: TrainEngine) -> Holdings:
    """Where this rank's part of the training state lies."""
    names = {param: name for name, param in engine.module.named_parameters() if param.requires_grad}
    shapes = {name: tuple(getattr(param, "ds_shape", param.shape)) for param, name in names.items()}
    wrapped = engine.deepspeed.optimizer
    stage = engine.run.zero.stage or 0
    if stage == 3:
        return Holdings(
            wrapped.fp32_partitioned_groups_flat, shapes, dict(_of_zero3(wrapped, names)), wrapped.optimizer
        )
    if stage > 0:
        return Holdings(
            wrapped.single_partition_of_fp32_groups, shapes, dict(_of_zero12(wrapped, names)), wrapped.optimizer
        )
    masters, fragments = _of_zero0(wrapped, names)
    return Holdings(masters, shapes, fragments, getattr(wrapped, "optimizer", wrapped))


def refresh_weights(engine: TrainEngine) -> None:
    """Makes the model's weights of the masters, as a step does; every rank calls."""
    wrapped, stage = engine.deepspeed.optimizer, engine.run.zero.stage or 0
    if stage == 3:
        _refresh_zero3(wrapped)
    elif stage > 0:
        wrapped.update_lp_params()
    elif hasattr(wrapped, "fp16_groups"):
        for param, master in _half_pairs(wrapped):
            param.data.copy_(master.view_as(param))


def loss_scale_state(engine: TrainEngine) -> dict[str, Any]:
    """fp16's dynamic loss scale; empty in other precisions."""
    scaler = _scaler(engine)
    return {} if scaler is None else {name: getattr(scaler, name) for name in _SCALER_FIELDS if hasattr(scaler, name)}


def set_loss_scale_state(engine: TrainEngine, state: dict[str, Any]) -> None:
    """Puts back what ``loss_scale_state`` gave."""
    scaler = _scaler(engine)
    for name, value in state.items():
        setattr(scaler, name, value)


_SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter")


def _scaler(engine: TrainEngine) -> Any | None:
    if engine.run.precision != "fp16":
        return None
    wrapped = engine.deepspeed.optimizer
    return wrapped.loss_scaler if engine.run.zero.stage else wrapped.loss_scale_config


def _of_zero3(wrapped: Any, names: dict[Any, str]) -> Iterator[tuple[str, Fragment]]:
    """Each rank has an equal share of every parameter, the last ones filled up (zero/stage3.py, grad_position)."""
    rank = torch.distributed.get_rank()
    for param, name in names.items():
        flat, offset, share = wrapped.grad_position[wrapped.get_param_id(param)]
        numel = min(share, param.ds_numel - share * rank)
        if numel > 0:
            yield name, Fragment(flat, offset, share * rank, numel)


def _of_zero12(wrapped: Any, names: dict[Any, str]) -> Iterator[tuple[str, Fragment]]:
    """Each rank has a stretch of all parameters laid end to end (utils/tensor_fragment.py, get_hp_fragment_mapping)."""
    for param, name in names.items():
        mapping = getattr(param, "_hp_mapping", None)
        if mapping is not None:
            high, low = mapping.hp_fragment_address, mapping.lp_fragment_address
            yield name, Fragment(mapping.param_group_index, high.start, low.start, low.numel)


def _of_zero0(wrapped: Any, names: dict[Any, str]) -> tuple[list[torch.Tensor], dict[str, Fragment]]:
    """Each rank has everything: in the parameters themselves, or in masters of half-precision ones (runtime/fp16)."""
    if hasattr(wrapped, "fp32_groups_flat"):
        found = {}
        for flat, group in enumerate(wrapped.fp16_groups):
            offset = 0
            for param in group:
                found[names[param]] = Fragment(flat, offset, 0, param.numel())
                offset += param.numel()
        return list(wrapped.fp32_groups_flat), found
    if hasattr(wrapped, "fp32_groups"):
        pairs = _half_pairs(wrapped)
    else:
        pairs = [(param, param) for group in wrapped.param_groups for param in group["params"]]
    fragments = {names[param]: Fragment(flat, 0, 0, param.numel()) for flat, (param, _) in enumerate(pairs)}
    return [master for _, master in pairs], fragments


def _half_pairs(wrapped: Any) -> list[tuple[Any, torch.Tensor]]:
    """(weight in half precision, its master) of DeepSpeed's optimizers for half precision without ZeRO."""
    if not hasattr(wrapped, "fp32_groups_flat"):
        return [
            pair
            for low, high in zip(wrapped.fp16_groups, wrapped.fp32_groups, strict=True)
            for pair in zip(low, high, strict=True)
        ]
    pairs = []
    for group, flat in zip(wrapped.fp16_groups, wrapped.fp32_groups_flat, strict=True):
        pieces = flat.detach().split([param.numel() for param in group])
        pairs += list(zip(group, pieces, strict=True))
    return pairs


def _refresh_zero3(wrapped: Any) -> None:
    """As DeepSpeed's own loading ends (zero/stage3.py, ``_rigid_load_state_dict`` and what calls it)."""
    wrapped.checkpoint_event_prologue()
    for low, high in zip(wrapped.fp16_partitioned_groups_flat, wrapped.fp32_partitioned_groups_flat, strict=True):
        low.data.copy_(high.data)
    for flat, group in zip(wrapped.fp16_partitioned_groups_flat, wrapped.fp16_partitioned_groups, strict=True):
        for param, part in zip(group, wrapped.unflatten(flat, group), strict=True):
            param.data = part.data
    if wrapped.persistent_parameters:
        wrapped.persistent_parameters[0].partition(wrapped.persistent_parameters)
    wrapped.checkpoint_event_epilogue()
