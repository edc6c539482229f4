"""Operators that send rows of tokens to experts and bring them back.

Each mirrors the torch operator of its name (``tools/autograd/derivatives.yaml``, torch 2.13); ``k`` is the number of
experts of a token, a row one (token, expert) pair.
"""

from __future__ import annotations

from vramplan.facts.dtype import Dtype
from vramplan.memory.kernels import TEMPORARY, WEIGHT_GRADIENT
from vramplan.memory.size import Size
from vramplan.memory.tape import Node, Tape, Tensor
from vramplan.memory.views import GRADIENTS, one_gradient


def rows(x: Tensor, indices: Tensor, numel: Size, label: str) -> Tensor:
    """``x[indices]``: a copy; its backward adds the gradients into zeros of x's shape (``index_backward``)."""
    tape, whole, dtype = x.storage.tape, x.numel, x.dtype
    node = tape.record("index", [x], [indices], one_gradient(whole, dtype))
    out = tape.new(numel, dtype, label)
    out.node = node
    return out


def filled(x: Tensor, mask: Tensor, label: str, in_place: bool = False) -> Tensor:
    """``x.masked_fill(mask, 0)``: saves the mask; its backward fills a copy of the gradient."""
    tape, numel, dtype = x.storage.tape, x.numel, x.dtype
    out = x.detach() if in_place else tape.new(numel, dtype, label)

    return tape.attach("masked_fill", out, [x], [mask], one_gradient(numel, dtype))


def grouped_product(
    x: Tensor, weight: Tensor, offsets: Tensor, out_numel: Size, label: str, whole: Tensor | None
) -> Tensor:
    """``grouped_mm(x, weight, offs=offsets)``: each expert's rows times its own matrix.

    Backward makes the gradient of all the experts' weights at once, then that of x. ``whole``: the gathered weight
    that is saved in the weight's place.
    """
    tape, x_numel, w_numel, dtype = x.storage.tape, x.numel, weight.numel, x.dtype
    need_x, need_w = x.requires_grad, weight.requires_grad
    saved = [*([whole or weight] if need_x else []), offsets, *([x] if need_w else [])]

    def backward(node: Node, grads: list[Tensor | None]) -> list[Tensor | None]:
        held = [node.unpack(index) for index in range(len(node.saved))]
        grad_w = tape.new(w_numel, dtype, WEIGHT_GRADIENT) if need_w else None
        grad_x = tape.new(x_numel, dtype, GRADIENTS) if need_x else None
        del held
        return [grad_x, grad_w]

    node = tape.record("grouped_mm", [x, weight], saved, backward)
    out = tape.new(out_numel, dtype, label)
    out.node = node
    return out


def batched_product(x: Tensor, weight: Tensor, out_numel: Size, label: str, whole: Tensor | None) -> Tensor:
    """``torch.bmm(x, weight)``: each expert's rows times its own matrix; backward makes the gradient of x first.

    ``whole``: the gathered weight that is saved in the weight's place.
    """
    tape, x_numel, w_numel, dtype = x.storage.tape, x.numel, weight.numel, x.dtype
    need_x, need_w = x.requires_grad, weight.requires_grad
    saved = [*([x] if need_w else []), *([whole or weight] if need_x else [])]

    def backward(node: Node, grads: list[Tensor | None]) -> list[Tensor | None]:
        held = [node.unpack(index) for index in range(len(node.saved))]
        grad_x = tape.new(x_numel, dtype, GRADIENTS) if need_x else None
        grad_w = tape.new(w_numel, dtype, WEIGHT_GRADIENT) if need_w else None
        del held
        return [grad_x, grad_w]

    node = tape.record("bmm", [x, weight], saved, backward)
    out = tape.new(out_numel, dtype, label)
    out.node = node
    return out


def repeated(x: Tensor, numel: Size, label: str) -> Tensor:
    """``x.repeat(n, 1)``: a copy; its backward sums the repeats."""
    tape, small, dtype = x.storage.tape, x.numel, x.dtype
    out = tape.new(numel, dtype, label)
    return tape.attach("repeat", out, [x], [], lambda node, grads: [tape.new(small, dtype, GRADIENTS)])


def scattered_into(values: Tensor, indices: Tensor, numel: Size, label: str) -> Tensor:
    """``torch.full(...).scatter_(1, indices, values)``: saves the indices; backward gathers."""
    tape, small, dtype = values.storage.tape, values.numel, values.dtype
    out = tape.new(numel, dtype, label)
    _widen(tape, numel, dtype)
    return tape.attach("scatter", out, [values], [indices], one_gradient(small, dtype))


def jittered(x: Tensor, label: str) -> Tensor:
    """``x *= torch.empty_like(x).uniform_(...)``: in place; saves the factors."""
    tape, numel, dtype = x.storage.tape, x.numel, x.dtype
    factors = tape.new(numel, dtype, label)

    return tape.attach("mul", x.detach(), [x], [factors], one_gradient(numel, dtype))


def best(scores: Tensor, numel: Size, label: str) -> tuple[Tensor, Tensor]:
    """``torch.topk(scores, k)``: values and indices; backward scatters into zeros of the scores' shape."""
    tape, whole, dtype = scores.storage.tape, scores.numel, scores.dtype
    values = tape.new(numel, dtype, label)
    indices = tape.new(numel, Dtype.INT64, label)

    def backward(node: Node, grads: list[Tensor | None]) -> list[Tensor | None]:
        held = node.unpack(0)
        result = scattered(tape, whole, dtype)
        del held
        return [result]

    return tape.attach("topk", values, [scores], [indices], backward), indices


def scattered(tape: Tape, numel: Size, dtype: Dtype) -> Tensor:
    """Zeros that gradients are scattered into (``value_selecting_reduction_backward``)."""
    out = tape.new(numel, dtype, GRADIENTS)
    _widen(tape, numel, dtype)
    return out


def _widen(tape: Tape, numel: Size, dtype: Dtype) -> None:
    """The CPU scatters and gathers of low precision in fp32 (ScatterGatherKernel.cpp, ``create_acc_buffer``)."""
    if tape.widens_operands and dtype is not Dtype.FP32:
        wide = tape.new(numel, Dtype.FP32, TEMPORARY)
        del wide


def picked(scores: Tensor, indices: Tensor, numel: Size, label: str) -> Tensor:
    """``scores.gather(1, indices)``: saves both; backward adds into zeros of the scores' shape."""
    tape, whole, dtype = scores.storage.tape, scores.numel, scores.dtype

    def backward(node: Node, grads: list[Tensor | None]) -> list[Tensor | None]:
        held = [node.unpack(0), node.unpack(1)]
        result = scattered(tape, whole, dtype)
        del held
        return [result]

    node = tape.record("gather", [scores], [scores, indices], backward)
    out = tape.new(numel, dtype, label)
    _widen(tape, numel, dtype)
    out.node = node
    return out


def divided_by_sum(x: Tensor, groups: Size, label: str, shifted: bool = False) -> Tensor:
    """``x /= x.sum(dim=-1, keepdim=True)``, ``groups`` being the sums: in place, so autograd keeps a copy of x.

    ``shifted``: a small number is added to the sums first.
    """
    tape, numel, dtype = x.storage.tape, x.numel, x.dtype

    def spread(node: Node, grads: list[Tensor | None]) -> list[Tensor | None]:
        grad = grads[0]
        return [Tensor(grad.storage, numel, dtype) if grad is not None else None]

    total = tape.attach("sum", tape.new(groups, dtype, label), [x], [], spread)
    if shifted:
        total = tape.attach("shift", tape.new(groups, dtype, label), [total], [], lambda node, grads: [grads[0]])
    before = tape.new(numel, dtype, label) if x.requires_grad else x

    def backward(node: Node, grads: list[Tensor | None]) -> list[Tensor | None]:
        held = [node.unpack(0), node.unpack(1)]
        scratch = [tape.new(numel, dtype, TEMPORARY) for _ in range(3)]  # x / total, the same once more, -grad
        wide = tape.new(numel, dtype, TEMPORARY)
        del scratch
        grad_x = tape.new(numel, dtype, GRADIENTS)
        del held
        grad_total = tape.new(groups, dtype, GRADIENTS)
        del wide
        return [grad_x, grad_total]

    return tape.attach("div", x.detach(), [x, total], [before, total], backward)


def summed(x: Tensor, k: int, numel: Size, label: str) -> Tensor:
    """``x.view(tokens, k, features).sum(dim=1)``: backward spreads the gradient over the k rows of a token."""
    tape, whole, dtype = x.storage.tape, x.numel, x.dtype

    def backward(node: Node, grads: list[Tensor | None]) -> list[Tensor | None]:
        grad = grads[0]
        if grad is None or k > 1:
            return [tape.new(whole, dtype, GRADIENTS)]
        same = Tensor(grad.storage, whole, dtype)
        same.is_view = True
        return [same]

    return tape.attach("sum", tape.new(numel, dtype, label), [x], [], backward)
