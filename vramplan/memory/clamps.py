"""Bounds on activations; ``ops`` hands them on."""

from __future__ import annotations

from vramplan.facts.dtype import Dtype
from vramplan.memory.kernels import TEMPORARY
from vramplan.memory.tape import Node, Tensor
from vramplan.memory.views import GRADIENTS


def clamped(x: Tensor, label: str) -> Tensor:
    """``x.clamp_(low, high)``: in place, so autograd saves a copy of what was there; backward asks both bounds."""
    tape, numel, dtype = x.storage.tape, x.numel, x.dtype
    before = [tape.new(numel, dtype, label)] if x.requires_grad else []
    out = Tensor(x.storage, numel, dtype)

    def backward(node: Node, grads: list[Tensor | None]) -> list[Tensor | None]:
        held = node.unpack(0)
        asked = [tape.new(numel, Dtype.BOOL, TEMPORARY) for _ in range(3)]
        result = tape.new(numel, dtype, GRADIENTS)
        del held, asked
        return [result]

    return tape.attach("clamp", out, [x], before, backward)


def clamped_copy(x: Tensor, bounds: int, label: str) -> Tensor:
    """``x.clamp(...)`` with one bound or both: saves x; backward asks each bound and picks (``clamp_backward``)."""
    tape, numel, dtype = x.storage.tape, x.numel, x.dtype

    def backward(node: Node, grads: list[Tensor | None]) -> list[Tensor | None]:
        held = node.unpack(0)
        asked = [tape.new(numel, Dtype.BOOL, TEMPORARY) for _ in range(bounds)]
        result = tape.new(numel, dtype, GRADIENTS)
        del held, asked
        return [result]

    return tape.attach("clamp", tape.new(numel, dtype, label), [x], [x], backward)
