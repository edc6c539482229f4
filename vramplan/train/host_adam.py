"""DeepSpeed's Adam in the host's memory, without memory of the steps that its process made.

Its C++ code keeps the powers of both betas and multiplies them on from one step to the next; only where the step is not
the one after the last are they computed anew (csrc/includes/cpu_adam.h, ``IncrementStep``). A process that resumes
computes them anew, and is a rounding off from the one that was not interrupted: enough for other bits in the losses.
A step before each, of nothing and with another number, makes every step compute them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def forget_powers(optimizer: Any, device: torch.device) -> None:
    """Makes each step of DeepSpeed's CPUAdam, or of its FusedAdam on the CPU, depend on its number alone. Muon has one
    of them for what is no matrix (runtime/zero/muon/muon_optimizer.py, ``aux_optimizer``; None where it steps inline).

    ``device``: where training is; under ZeRO-3 the optimizer's groups are empty between steps.
    """
    optimizer = getattr(optimizer, "aux_optimizer", None) or optimizer
    if hasattr(optimizer, "ds_opt_adam"):
        optimizer.ds_opt_adam = _Library(optimizer.ds_opt_adam)
    elif hasattr(optimizer, "multi_tensor_adam") and device.type == "cpu":
        optimizer.multi_tensor_adam = _forgetful(optimizer.multi_tensor_adam)


def _forgetful(multi_tensor_adam: Callable[..., Any]) -> Callable[..., Any]:
    """csrc/cpu/adam/fused_adam.cpp, ``multi_tensor_adam``."""

    def step(
        chunk_size: int,
        overflow: torch.Tensor,
        tensors: list[list[torch.Tensor]],
        lr: float,
        beta1: float,
        beta2: float,
        eps: float,
        number: int,
        *options: Any,
    ) -> Any:
        nothing = [[like[0].new_empty(0)] for like in tensors]
        multi_tensor_adam(chunk_size, overflow, nothing, lr, beta1, beta2, eps, number + 2, *options)
        return multi_tensor_adam(chunk_size, overflow, tensors, lr, beta1, beta2, eps, number, *options)

    return step


class _Library:
    """The extension that CPUAdam calls (ops/adam/cpu_adam.py)."""

    def __init__(self, library: Any) -> None:
        self._library = library

    def adam_update(self, optimizer_id: int, number: int, *options: Any) -> Any:
        tensors = len(options) - 4
        nothing = (each.new_empty(0) for each in options[tensors:])
        self._library.adam_update(optimizer_id, number + 2, *options[:tensors], *nothing)
        return self._library.adam_update(optimizer_id, number, *options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._library, name)
