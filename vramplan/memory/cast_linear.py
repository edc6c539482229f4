"""``F.linear`` as DeepSpeed's ZeRO-3 replaces it, under autocast."""

from __future__ import annotations

from vramplan.facts.dtype import Dtype
from vramplan.memory.kernels import TEMPORARY, WEIGHT_GRADIENT
from vramplan.memory.ops import to
from vramplan.memory.size import ZERO, Size
from vramplan.memory.tape import Node, Tensor
from vramplan.memory.views import GRADIENTS


def linear_cast_zero3(
    x: Tensor, weight: Tensor, bias: Tensor | None, out_numel: Size, low: Dtype, label: str, whole: Tensor | None = None
) -> Tensor:
    """DeepSpeed's ``F.linear`` of ZeRO-3 under autocast, of a 3-D input: saves x and the weight as they are.

    Autocast sees the products inside it (deepspeed/runtime/zero/linear.py, ``LinearFunctionForZeroStage3``): forward
    casts x and a transposed view of the weight, which is not kept (``at::autocast::cached_cast``); backward, a region
    of its own, keeps the cast of a trained weight until it ends. Gradients are made in low precision and then cast to
    the formats of x and of the weight (torch/csrc/autograd/engine.cpp, ``validate_outputs``).
    """
    tape = x.storage.tape
    casts = [tape.new(each.numel, low, TEMPORARY) for each in (x, weight) if each.dtype is not low]
    out = tape.new(out_numel, low, label)
    del casts
    need_x, need_w = x.requires_grad, weight.requires_grad
    need_b = bias is not None and bias.requires_grad
    saved = [x, whole if whole is not None else weight]
    x_numel, x_dtype, w_numel, w_dtype = x.numel, x.dtype, weight.numel, weight.dtype
    b_numel = bias.numel if bias is not None else ZERO

    def backward(node: Node, grads: list[Tensor | None]) -> list[Tensor | None]:
        held = [node.unpack(index) for index in range(len(node.saved))]
        grad_x = grad_w = grad_b = cast_w = None
        if need_x:
            cast_w = tape.new(w_numel, low, TEMPORARY) if w_dtype is not low else None
            grad_x = tape.new(x_numel, low, GRADIENTS)
            if not need_w:
                cast_w = None
        if need_w:
            cast_x = tape.new(x_numel, low, TEMPORARY) if x_dtype is not low else None
            grad_w = tape.new(w_numel, low, WEIGHT_GRADIENT)
            del cast_x
        if need_b:
            grad_b = tape.new(b_numel, Dtype.FP32, WEIGHT_GRADIENT)
        del cast_w
        # a Python function has let go of what it was given, and of what it unpacked, when its results are cast
        grads.clear()
        del held
        if grad_x is not None:
            grad_x = to(grad_x, x_dtype, GRADIENTS)
        if grad_w is not None:
            grad_w = to(grad_w, w_dtype, WEIGHT_GRADIENT)
        return [grad_x, grad_w, grad_b]

    return tape.attach("linear", out, [x, weight, bias], saved, backward)
