"""Operators that need a value, which a fake tensor has not: what they are told."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch._meta_registrations import _create_grouped_mm_output_tensor

from vramplan.simulate.accumulate import add_as_engine
from vramplan.simulate.tracker import Answer, Tracker

aten = torch.ops.aten


def item_value(tracker: Tracker, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> float | int | bool:
    """``.item()``, ``float()``, ``bool()``: a number that looks like neither an overflow nor a zero divisor.

    A bool is False (nothing is infinite, nothing differs), but what ``all`` made is True (all tokens belong to one
    sequence, all ranks agree).
    """
    tensor = args[0]
    if getattr(tensor, "constant", None) is not None:
        value: float | int | bool = tensor.constant.item()
        return value
    _refuse_in_code_of_the_model()
    if tensor.dtype.is_floating_point:
        return 1.0
    return tracker.op_of(tensor) == "aten::all" if tensor.dtype is torch.bool else 0


def _refuse_in_code_of_the_model() -> None:
    """Raises RuntimeError where code that came with the model asks for the value: which way it goes is not known."""
    frame: FrameType | None = sys._getframe(3)
    while frame is not None and any(part in frame.f_code.co_filename for part in ("/vramplan/simulate/", "/torch/")):
        frame = frame.f_back
    if frame is not None and "transformers_modules" in frame.f_code.co_filename:
        place = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name}"
        raise RuntimeError(f"aten::_local_scalar_dense: {place} goes by a tensor's value, and a fake tensor has none")


def grouped_mm(tracker: Tracker, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """``_grouped_mm`` of fp16 and fp32, which the kernels take (ATen/native/GroupedMMUtils.h,
    ``_grouped_mm_validate_inputs``) and torch's function for fakes refuses (``_meta_grouped_mm_common``)."""
    first, second = args[0], args[1]
    if first.dtype is torch.bfloat16 or second.dtype is not first.dtype:
        return func(*args, **kwargs)
    offsets = args[2] if len(args) > 2 else kwargs.get("offs")
    return _create_grouped_mm_output_tensor(first, second, offsets, first.dtype)


def scatter_into_zeros(tracker: Tracker, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """``scatter`` as the backward of ``max`` and ``topk`` calls it: into the zeros themselves, but for fake tensors,
    which are a subclass (torch/csrc/autograd/FunctionsManual.cpp, ``value_selecting_reduction_backward_symint``)."""
    node = torch._C._current_autograd_node()
    if node is not None and not torch.is_grad_enabled() and tracker.op_of(args[0]) == "aten::new_zeros":
        return args[0]
    return func(*args, **kwargs)


ANSWERS: dict[Any, Answer] = {
    aten._local_scalar_dense.default: item_value,
    aten._grouped_mm.default: grouped_mm,
    aten.add.Tensor: add_as_engine,
    aten.scatter.src: scatter_into_zeros,
    aten.equal.default: lambda tracker, func, args, kwargs: True,
}
