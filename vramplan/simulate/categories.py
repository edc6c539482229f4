"""What each block of a trace is: parameter, gradient, optimizer state, activation, logits, communication or temporary.

Decided by where and when a block was born, what it was shaped like, how long it lived, and what the engine holds.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from vramplan.memory.birth import Birth
from vramplan.memory.term import Category, Phase
from vramplan.rank.play import RankPlayer
from vramplan.simulate.trace import ALIVE, CATEGORIES, Trace
from vramplan.simulate.tracker import RECOMPUTATION, Tracker

_GATHER_FILES = ("deepspeed/runtime/zero/partition_parameters.py", "deepspeed/runtime/zero/partitioned_param")
_GATHER_BUFFER = "_all_gather_dtype"
"""Where tensors that are gathered together are received, to be copied out of it one by one."""
_REDUCE_WORDS = ("bucket", "ipg", "reduce", "average", "coalesc")
_NUMBER = {category: number for number, category in enumerate(CATEGORIES)}


def categorise(tracker: Tracker, player: RankPlayer) -> None:
    """Writes the category of every block of the tracker's trace."""
    trace = tracker.trace
    ends = {span.name: span.end for span in trace.phases}
    vocab_size = getattr(getattr(player.model, "config", None), "vocab_size", None)
    held = dict(_held_by_engine(tracker, player))
    for block in range(len(trace)):
        birth = trace.births[trace.birth[block]]
        survives = _survives(trace, block, ends.get(birth.phase, 0))
        is_logits = tracker.last_dims[block] == vocab_size and not tracker.param_shaped[block]
        category = held.get(block) or _category(birth, survives, bool(tracker.param_shaped[block]), is_logits)
        trace.category[block] = _NUMBER[category]


def _category(birth: Birth, survives: bool, param_shaped: bool, is_logits: bool) -> Category:
    phase = birth.phase.rsplit(".", 1)[-1]
    if not phase:
        return Category.ACTIVATION  # token ids and labels, made between phases
    if phase == Phase.MODEL_LOAD.value:
        return Category.PARAMETER
    if birth.frame.startswith(_GATHER_FILES) and phase != Phase.ENGINE_INIT.value:
        return Category.COMMUNICATION if birth.frame.endswith(_GATHER_BUFFER) else Category.PARAMETER
    if _reduces(birth):
        return Category.COMMUNICATION
    if phase == Phase.OPTIMIZER_STEP.value and not survives and _casts_gradients(birth):
        return Category.GRADIENT
    if phase == Phase.ENGINE_INIT.value or phase == Phase.OPTIMIZER_STEP.value:
        return Category.OPTIMIZER if survives else Category.TEMPORARY
    if is_logits:
        return Category.LOGITS
    if phase == Phase.FORWARD.value:
        return Category.ACTIVATION if survives else Category.TEMPORARY
    if birth.node == RECOMPUTATION:
        return Category.ACTIVATION
    return Category.GRADIENT if survives or param_shaped else Category.TEMPORARY


def _reduces(birth: Birth) -> bool:
    """Whether DeepSpeed's line is one of a reduction; torch's own flattening stands within it."""
    line = _line_of_deepspeed(birth)
    return any(word in line for word in _REDUCE_WORDS)


def _casts_gradients(birth: Birth) -> bool:
    """Whether DeepSpeed's optimizers made it in a step themselves, from gradients: what Adam makes stands in
    ``deepspeed/ops`` or in torch, and norms are of a function of that name."""
    line = _line_of_deepspeed(birth)
    return line.startswith("deepspeed/runtime/") and "norm" not in line


def _line_of_deepspeed(birth: Birth) -> str:
    """The innermost of the lines that are kept, if it is DeepSpeed's; else empty."""
    frame = birth.frame if "deepspeed/" in birth.frame else birth.outer_frame
    return frame if "deepspeed/" in frame else ""


def _survives(trace: Trace, block: int, end: int) -> bool:
    died = trace.died_at[block]
    return died == ALIVE or died >= end


def _held_by_engine(tracker: Tracker, player: RankPlayer) -> Iterator[tuple[int, Category]]:
    """Blocks whose nature is known by who holds them when the run has ended; what comes later overrides."""
    optimizer = getattr(player.engine, "optimizer", None)
    for name, tensor in _tensors_of(optimizer):
        category = next((known for word, known in _BY_ATTRIBUTE if word in name), None)
        block = tracker.block_of(tensor)
        if category is not None and block is not None:
            yield block, category
    for state in getattr(getattr(optimizer, "optimizer", optimizer), "state", {}).values():
        for _, tensor in _tensors_of(state):
            block = tracker.block_of(tensor)
            if block is not None:
                yield block, Category.OPTIMIZER
    yield from _held_against_forgetting(tracker, player)
    for param in player.model.parameters() if player.model is not None else ():
        of_param: tuple[tuple[torch.Tensor | None, Category], ...] = (
            (param.grad, Category.GRADIENT),
            (param.data, Category.PARAMETER),
            (getattr(param, "ds_tensor", None), Category.PARAMETER),
        )
        for held, category in of_param:
            block = tracker.block_of(held) if held is not None else None
            if block is not None:
                yield block, category


def _held_against_forgetting(tracker: Tracker, player: RankPlayer) -> Iterator[tuple[int, Category]]:
    """The starting weights, the Fisher diagonal and the frozen copy of the base: the ledger's categories."""
    springs = player.retention.springs if player.retention is not None else None
    held = [] if springs is None else list(springs.kept_tensors())
    if player.reference is not None:
        for param in player.reference.parameters():
            held += [param.data, *([param.ds_tensor] if hasattr(param, "ds_tensor") else [])]
    for tensor in held:
        block = tracker.block_of(tensor)
        if block is not None:
            yield block, Category.PARAMETER


_BY_ATTRIBUTE = (
    ("ipg", Category.COMMUNICATION),
    ("bucket", Category.COMMUNICATION),
    ("grad", Category.GRADIENT),
    ("fp32", Category.OPTIMIZER),
)
"""Words in the names of a DeepSpeed optimizer's attributes, and what such an attribute holds."""


def _tensors_of(owner: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors that an object's attributes (or a dict's values) are, or hold in lists and dicts up to two deep."""
    items = owner.items() if isinstance(owner, dict) else vars(owner).items() if hasattr(owner, "__dict__") else ()
    for name, value in list(items):
        yield from ((str(name), tensor) for tensor in _flatten(value, depth=3))


def _flatten(value: Any, depth: int) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif depth and isinstance(value, dict):
        for item in value.values():
            yield from _flatten(item, depth - 1)
    elif depth and isinstance(value, list | tuple):
        for item in value:
            yield from _flatten(item, depth - 1)
    elif depth and hasattr(value, "__dict__") and type(value).__module__.startswith("deepspeed"):
        for item in vars(value).values():
            yield from _flatten(item, depth - 1)
