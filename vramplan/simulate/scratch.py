"""What kernels allocate and free inside an operator, where an operator on a fake tensor shows its result alone.

Read off ATen's source; only what is large enough to matter is here. Each function gets the operator's arguments and
its ``result``, and returns bytes that live together before the operator returns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from vramplan.simulate.tracker import Scratch

aten = torch.ops.aten


def safe_softmax(scores: torch.Tensor, dim: int, *_: Any, result: torch.Tensor, **__: Any) -> Sequence[int]:
    """aten/src/ATen/native/SoftMax.cpp ``_safe_softmax``: where scores are minus infinity (bool), whether a whole row
    is (bool), and a zero of the result's dtype."""
    rows = scores.numel() // scores.shape[dim]
    return scores.numel(), rows, result.element_size()


CPU_SCRATCH: dict[Any, Scratch] = {aten._safe_softmax.default: safe_softmax}
