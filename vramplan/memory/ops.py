"""The operators of a decoder layer: what each allocates, what it saves for backward, what its backward allocates.

Each function mirrors the torch operator of its name as ``tools/autograd/derivatives.yaml`` (torch 2.13) differentiates
it; allocations come in the operator's own order. ``label`` says under which heading the result is counted.
"""

from __future__ import annotations

from vramplan.facts.dtype import Dtype
from vramplan.memory.clamps import clamped as clamped
from vramplan.memory.clamps import clamped_copy as clamped_copy
from vramplan.memory.kernels import TEMPORARY as TEMPORARY
from vramplan.memory.kernels import WEIGHT_GRADIENT as WEIGHT_GRADIENT
from vramplan.memory.kernels import dropout as dropout
from vramplan.memory.kernels import embedding as embedding
from vramplan.memory.kernels import flash_attention as flash_attention
from vramplan.memory.kernels import layer_norm as layer_norm
from vramplan.memory.kernels import nll_loss as nll_loss
from vramplan.memory.leaf import Parameter
from vramplan.memory.products import linear as linear
from vramplan.memory.products import linear_4bit as linear_4bit
from vramplan.memory.products import matmul as matmul
from vramplan.memory.size import Size
from vramplan.memory.tape import Node, Tensor
from vramplan.memory.views import GRADIENTS as GRADIENTS
from vramplan.memory.views import cat as cat
from vramplan.memory.views import clone as clone
from vramplan.memory.views import gathered as gathered
from vramplan.memory.views import one_gradient as one_gradient
from vramplan.memory.views import piece as piece
from vramplan.memory.views import placed as placed
from vramplan.memory.views import resized as resized
from vramplan.memory.views import split as split
from vramplan.memory.views import spread as spread
from vramplan.memory.views import to_copy as to_copy
from vramplan.memory.views import to_heads as to_heads
from vramplan.memory.views import view as view


def to(x: Tensor, dtype: Dtype, label: str) -> Tensor:
    """``x.to(dtype)``: ``x`` itself if it has that dtype, else a copy; saves nothing."""
    if x.dtype is dtype:
        return x
    tape, source = x.storage.tape, x.dtype
    out = tape.new(x.numel, dtype, label)

    def backward(node: Node, grads: list[Tensor | None]) -> list[Tensor | None]:
        return [tape.new(grads[0].numel, source, GRADIENTS) if grads[0] is not None else None]

    return tape.attach("to", out, [x], [], backward)


def wider(a: Dtype, b: Dtype) -> Dtype:
    """The format of a result of both (``c10/core/ScalarType.h``, ``promoteTypes``, for two float formats)."""
    return a if a.nbytes >= b.nbytes else b


def _widened(dtype: Dtype, *operands: Tensor) -> list[Tensor]:
    """Copies of narrower operands that an addition works on, where it needs them."""
    tape = operands[0].storage.tape
    if not tape.widens_operands:
        return []
    return [tape.new(each.numel, dtype, TEMPORARY) for each in operands if each.dtype is not dtype]


def add(a: Tensor, b: Tensor, label: str, in_place: bool = False) -> Tensor:
    """``a + b`` of equal shapes: saves nothing, both get the same gradient, cast where an operand is narrower.

    ``in_place``: ``a += b``, a result without bytes of its own.
    """
    tape, dtypes = a.storage.tape, (a.dtype, b.dtype)
    needs = (a.requires_grad, b.requires_grad)
    dtype = wider(*dtypes)
    copies = _widened(dtype, a, b)
    out = Tensor(a.storage, a.numel, dtype) if in_place else tape.new(a.numel, dtype, label)
    del copies

    def backward(node: Node, grads: list[Tensor | None]) -> list[Tensor | None]:
        grad = grads[0]
        if grad is None:
            return [None, None]
        return [_cast(grad, each) if need else None for each, need in zip(dtypes, needs, strict=True)]

    return tape.attach("add", out, [a, b], [], backward)


def _cast(grad: Tensor, dtype: Dtype) -> Tensor:
    """The gradient in its tensor's format (``engine.cpp``, ``validate_outputs``); the same bytes if it has it."""
    if grad.dtype is dtype:
        same = Tensor(grad.storage, grad.numel, grad.dtype)
        same.is_view = grad.is_view
        return same
    return grad.storage.tape.new(grad.numel, dtype, GRADIENTS)


def sub(a: Tensor, b: Tensor, label: str) -> Tensor:
    """``a - b`` of equal shapes and formats: saves nothing, the second's gradient is the negated one."""
    tape, numel, dtype = a.storage.tape, a.numel, a.dtype
    out = tape.new(numel, dtype, label)
    need_b = b.requires_grad

    def backward(node: Node, grads: list[Tensor | None]) -> list[Tensor | None]:
        return [grads[0], tape.new(numel, dtype, GRADIENTS) if need_b else None]

    return tape.attach("sub", out, [a, b], [], backward)


def add_broadcast(x: Tensor, small: Tensor, label: str) -> Tensor:
    """``x + small`` with ``small`` shared by the batch: its gradient is summed into a new tensor."""
    tape, small_numel, dtype = x.storage.tape, small.numel, x.dtype
    out = tape.new(x.numel, dtype, label)

    def backward(node: Node, grads: list[Tensor | None]) -> list[Tensor | None]:
        return [grads[0], tape.new(small_numel, dtype, GRADIENTS)]

    return tape.attach("add", out, [x, small], [], backward)


def add_vector(x: Tensor, vector: Parameter, label: str) -> Tensor:
    """``x + bias``: the bias's gradient is a sum over the tokens."""
    tape, dtypes = x.storage.tape, (x.dtype, vector.dtype)
    copies = _widened(wider(*dtypes), x, vector)
    out = tape.new(x.numel, wider(*dtypes), label)
    del copies
    needs = x.requires_grad, vector.requires_grad

    def backward(node: Node, grads: list[Tensor | None]) -> list[Tensor | None]:
        grad = grads[0]
        if grad is None:
            return [None, None]
        summed = tape.new(vector.numel, dtypes[1], WEIGHT_GRADIENT) if needs[1] else None
        return [_cast(grad, dtypes[0]) if needs[0] else None, summed]

    return tape.attach("bias", out, [x, vector], [], backward)


def unary(x: Tensor, label: str, saves: str, temporaries: int = 0, dtype: Dtype | None = None) -> Tensor:
    """An elementwise function of one tensor.

    ``saves``: ``"input"``, ``"result"`` or ``"nothing"``; ``temporaries``: tensors of the input's size that its
    backward formula makes besides the gradient.
    """
    tape = x.storage.tape
    out = tape.new(x.numel, dtype or x.dtype, label)
    source, numel = x.dtype, x.numel

    def backward(node: Node, grads: list[Tensor | None]) -> list[Tensor | None]:
        held = [node.unpack(index) for index in range(len(node.saved))]
        scratch = [tape.new(numel, source, TEMPORARY) for _ in range(temporaries)]
        result = tape.new(numel, source, GRADIENTS)
        del held, scratch
        return [result]

    saved = {"input": [x], "result": [out], "nothing": []}[saves]
    return tape.attach("unary", out, [x], saved, backward)


def scaled(x: Tensor, label: str) -> Tensor:
    """``x * number``: saves nothing, its backward multiplies too."""
    return unary(x, label, "nothing")


def mul(a: Tensor, b: Tensor, label: str) -> Tensor:
    """``a * b`` of equal shapes: each is saved if the other needs a gradient."""
    tape, dtypes = a.storage.tape, (a.dtype, b.dtype)
    dtype, numel = wider(*dtypes), a.numel
    needs = (a.requires_grad, b.requires_grad)
    saved = ([b] if needs[0] else []) + ([a] if needs[1] else [])

    def backward(node: Node, grads: list[Tensor | None]) -> list[Tensor | None]:
        held = [node.unpack(index) for index in range(len(node.saved))]
        wide = [tape.new(numel, dtype, GRADIENTS) if need else None for need in needs]
        del held
        return [_cast(grad, each) if grad is not None else None for grad, each in zip(wide, dtypes, strict=True)]

    node = tape.record("mul", [a, b], saved, backward)
    out = tape.new(numel, dtype, label)
    out.node = node
    return out


def mul_broadcast(x: Tensor, small: Tensor, label: str, small_first: bool = False) -> Tensor:
    """``x * small`` (or ``small * x``) where ``small`` is broadcast over ``x``: a weight, a scale, a table.

    The result has the wider format of the two. The gradient of ``small`` is first made in ``x``'s shape, then summed,
    that of ``x`` cast: that of the second operand is made first, that of the first is reduced or cast first
    (``engine.cpp``, ``validate_outputs``).
    """
    tape = x.storage.tape
    dtype, numel, x_dtype = wider(x.dtype, small.dtype), x.numel, x.dtype
    need_x, need_small = x.requires_grad, small.requires_grad
    saved = ([small] if need_x else []) + ([x] if need_small else [])
    small_numel, small_dtype = small.numel, small.dtype
    small_label = WEIGHT_GRADIENT if isinstance(small, Parameter) else GRADIENTS

    def times(other: Tensor, heading: str) -> Tensor:
        copies = _widened(dtype, other)
        result = tape.new(numel, dtype, heading)
        del copies
        return result

    def backward(node: Node, grads: list[Tensor | None]) -> list[Tensor | None]:
        held = [node.unpack(index) for index in range(len(node.saved))]
        wide = times(held[-1], TEMPORARY) if need_small and not small_first else None
        grad_x = times(held[0], GRADIENTS) if need_x else None
        if need_small and small_first:
            wide = times(held[-1], TEMPORARY)
        del held
        if not small_first and grad_x is not None:
            grad_x = _cast(grad_x, x_dtype)
        grad_small = tape.new(small_numel, small_dtype, small_label) if need_small else None
        del wide
        return [_cast(grad_x, x_dtype) if grad_x is not None else None, grad_small]

    node = tape.record("mul", [x, small], saved, backward)
    copies = _widened(dtype, x, small)
    out = tape.new(numel, dtype, label)
    del copies
    out.node = node
    return out


def sub_broadcast(x: Tensor, small: Tensor, label: str) -> Tensor:
    """``x - small`` where ``small`` is one value a row: its gradient is the negated one, summed."""
    tape, numel, dtype, small_numel = x.storage.tape, x.numel, x.dtype, small.numel
    out = tape.new(numel, dtype, label)
    need_small = small.requires_grad

    def backward(node: Node, grads: list[Tensor | None]) -> list[Tensor | None]:
        wide = tape.new(numel, dtype, TEMPORARY) if need_small else None
        grad_small = tape.new(small_numel, dtype, GRADIENTS) if need_small else None
        del wide
        return [grads[0], grad_small]

    return tape.attach("sub", out, [x, small], [], backward)


def shifted(x: Tensor, label: str) -> Tensor:
    """``x + number``: saves nothing, hands the gradient on."""
    tape = x.storage.tape
    out = tape.new(x.numel, x.dtype, label)
    return tape.attach("shift", out, [x], [], lambda node, grads: [grads[0]])


def masked(x: Tensor, mask: Tensor, label: str) -> Tensor:
    """``x + mask``: a new tensor of the wider format; the gradient passes on."""
    tape, source = x.storage.tape, x.dtype
    dtype = wider(source, mask.dtype)
    copies = _widened(dtype, x, mask)
    out = tape.new(x.numel, dtype, label)
    del copies

    def backward(node: Node, grads: list[Tensor | None]) -> list[Tensor | None]:
        return [_cast(grads[0], source) if grads[0] is not None else None]

    return tape.attach("mask", out, [x], [], backward)


def square(x: Tensor, label: str) -> Tensor:
    """``x.pow(2)``: saves x; backward ``grad * (2 * x.pow(1))`` makes two temporaries."""
    return unary(x, label, "input", temporaries=2)


def row_mean(x: Tensor, rows: Size, label: str) -> Tensor:
    """``x.mean(-1, keepdim=True)``: one value a row; its backward divides the expanded gradient into a new tensor."""
    tape, numel, dtype = x.storage.tape, x.numel, x.dtype
    out = tape.new(rows, dtype, label)

    def backward(node: Node, grads: list[Tensor | None]) -> list[Tensor | None]:
        return [tape.new(numel, dtype, GRADIENTS)]

    return tape.attach("mean", out, [x], [], backward)


def softmax(x: Tensor, dtype: Dtype, device: str, label: str) -> Tensor:
    """``softmax(x, dtype=...)``: saves its result. CUDA widens fp16 inside the kernel, all else is copied first
    (SoftMax.cpp, ``softmax``)."""
    if x.dtype is not dtype and not (device == "cuda" and x.dtype is Dtype.FP16 and dtype is Dtype.FP32):
        x = to(x, dtype, TEMPORARY)
    tape, source, numel = x.storage.tape, x.dtype, x.numel
    out = tape.new(numel, dtype, label)

    return tape.attach("softmax", out, [x], [out], one_gradient(numel, source))


def log_softmax(x: Tensor, label: str) -> Tensor:
    """``log_softmax``: saves its result; backward makes one tensor."""
    return unary(x, label, "result")
