"""Gradients that meet at one input: the autograd engine adds them in place where it holds the first one alone.

For fake tensors the engine never does (they are a subclass, ``isTensorSubclassLike``), so its additions arrive here
as ``aten::add`` and are answered as for plain tensors (torch/csrc/autograd/input_buffer.cpp, ``accumulate``).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import lru_cache
from types import FrameType
from typing import Any

import torch
from torch._prims_common import is_non_overlapping_and_dense_or_false
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

_ENGINE = "_engine_run_backward"
"""torch/autograd/graph.py: the last Python function before the engine."""
_MACHINERY = ("/vramplan/simulate/", "/torch/_", "/torch/utils/")


def add_as_engine(tracker: Any, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Answers ``aten::add``: the first operand itself where the engine would add into it."""
    first, second = args[0], args[1]
    if (
        not torch.is_grad_enabled()
        and torch._C._current_autograd_node() is not None
        and isinstance(first, FakeTensor)
        and isinstance(second, FakeTensor)
        and not kwargs
        and (first.dtype, first.shape) == (second.dtype, second.shape)
        and _use_counts(first) == sole_use_counts()
        and is_non_overlapping_and_dense_or_false(first)
        and _called_by_engine()
    ):
        return first
    return func(*args, **kwargs)


def _called_by_engine() -> bool:
    """Whether no Python runs between the engine and the operator (a hook or a Python function's backward would)."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        path = frame.f_code.co_filename
        if not any(part in path for part in _MACHINERY):
            return frame.f_code.co_name == _ENGINE
        frame = frame.f_back
    return True  # a device's own thread of the engine, which has no Python below


def _use_counts(tensor: torch.Tensor) -> tuple[int, int]:
    """How many hold the storage and the tensor: the engine's buffer, and those who look, here and in the mode."""
    storage = tensor.untyped_storage()
    return torch._C._storage_Use_Count(storage._cdata), tensor._use_count()  # type: ignore[attr-defined]


@lru_cache(maxsize=1)
def sole_use_counts() -> tuple[int, int]:
    """What ``_use_counts`` reads of a gradient that only the engine's buffer holds, seen from a dispatch mode.

    Call it once outside of any mode and any backward: it runs a small backward of its own.
    """
    seen: list[tuple[int, int]] = []

    class Probe(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
        ) -> Any:
            if func is torch.ops.aten.add.Tensor and torch._C._current_autograd_node() is not None:
                return _probe_answer(seen, func, args, kwargs or {})
            return func(*args, **(kwargs or {}))

    with _disable_current_modes(), FakeTensorMode(), Probe(), torch.enable_grad():  # type: ignore[no-untyped-call]
        leaf = torch.empty(2, requires_grad=True)
        (leaf.sin().sum() + leaf.cos().sum()).backward()
    return seen[0]


def _probe_answer(seen: list[tuple[int, int]], func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Reads the counts at the same depth of calls as ``add_as_engine`` does."""
    first = args[0]
    seen.append(_use_counts(first))
    return func(*args, **kwargs)
