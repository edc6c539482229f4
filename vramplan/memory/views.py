"""Operators that make other shapes of the same elements: views, slices, joins and copies.

Each mirrors the torch operator of its name (``tools/autograd/derivatives.yaml``, torch 2.13); ``ops`` hands them on.
"""

from __future__ import annotations

from vramplan.facts.dtype import Dtype
from vramplan.memory.size import Size, scale
from vramplan.memory.tape import GRADIENTS as GRADIENTS
from vramplan.memory.tape import Backward, Node, Tensor


def resized(numel: Size, times: int, over: int = 1) -> Size:
    """``numel * times / over``, exact for the widths of a model."""
    a, b, c, d, e = scale(numel, times)
    return (a // over, b // over, c // over, d // over, e // over)


def view(x: Tensor, numel: Size | None = None) -> Tensor:
    """Another shape of the same bytes (``view``, ``transpose``, ``narrow``); its gradient is a view too."""
    tape = x.storage.tape
    out = Tensor(x.storage, numel if numel is not None else x.numel, x.dtype)

    def backward(node: Node, grads: list[Tensor | None]) -> list[Tensor | None]:
        grad = grads[0]
        if grad is None:
            return [None]
        same = Tensor(grad.storage, grad.numel, grad.dtype)
        same.is_view = True
        return [same]

    return tape.attach("view", out, [x], [], backward)


def to_heads(x: Tensor) -> Tensor:
    """``x.view(..., heads, width).transpose(1, 2)``, whose gradient comes with heads before positions: the backward of
    ``view`` copies it into the projection's order."""
    tape, numel, dtype = x.storage.tape, x.numel, x.dtype
    out = Tensor(x.storage, numel, dtype)
    return tape.attach("heads", out, [x], [], lambda node, grads: [tape.new(numel, dtype, GRADIENTS)])


def placed(parts: list[Tensor], numel: Size, label: str) -> Tensor:
    """``whole = new_empty(...)``, then ``whole[..., a:b].copy_(part)`` for each part, in the first one's format."""
    out = parts[0].storage.tape.new(numel, parts[0].dtype, label)
    for part in parts:
        out = _put(out, part)
    return out


def _put(whole: Tensor, part: Tensor) -> Tensor:
    """``whole[..., a:b].copy_(part)``. Backward copies the whole gradient, then the slice of it, and where more was
    there before, puts zeros into its place (torch/csrc/autograd/functions/tensor.cpp, ``CopySlices::apply_impl``)."""
    tape, numel, dtype = whole.storage.tape, whole.numel, whole.dtype
    part_numel, part_dtype = part.numel, part.dtype
    needs = whole.requires_grad, part.requires_grad
    out = Tensor(whole.storage, numel, dtype)

    def backward(node: Node, grads: list[Tensor | None]) -> list[Tensor | None]:
        before = tape.new(numel, dtype, GRADIENTS)
        own = tape.new(part_numel, dtype, GRADIENTS)
        zeros = tape.new(part_numel, dtype, GRADIENTS) if needs[0] else None
        if needs[1] and part_dtype is not dtype:
            own = tape.new(part_numel, part_dtype, GRADIENTS)
        del zeros
        return [before if needs[0] else None, own if needs[1] else None]

    return tape.attach("copy_slices", out, [whole, part], [], backward)


def clone(x: Tensor, label: str) -> Tensor:
    """``x.contiguous()`` of a transposed tensor: a copy; its backward hands the gradient on."""
    tape = x.storage.tape
    out = tape.new(x.numel, x.dtype, label)
    return tape.attach("clone", out, [x], [], lambda node, grads: [grads[0]])


def to_copy(x: Tensor, label: str) -> Tensor:
    """A copy that no gradient passes through (tables, masks)."""
    return x.storage.tape.new(x.numel, x.dtype, label)


def piece(x: Tensor, numel: Size) -> Tensor:
    """A slice of ``x``; its backward puts the gradient into zeros of x's shape (``slice_backward``)."""
    tape, whole, dtype = x.storage.tape, x.numel, x.dtype
    out = Tensor(x.storage, numel, dtype)
    return tape.attach("slice", out, [x], [], lambda node, grads: [tape.new(whole, dtype, GRADIENTS)])


def gathered(x: Tensor, numel: Size, label: str) -> Tensor:
    """``x[..., [i], :]``: a copy; its backward puts the gradient into zeros of x's shape (``index_backward``)."""
    tape, whole, dtype = x.storage.tape, x.numel, x.dtype
    out = tape.new(numel, dtype, label)
    return tape.attach("index", out, [x], [], lambda node, grads: [tape.new(whole, dtype, GRADIENTS)])


def spread(x: Tensor, numel: Size, label: str, copied: bool = True) -> Tensor:
    """An expanded view made whole (``repeat_kv``), if ``copied``; its backward sums the copies into one tensor."""
    tape, small, dtype = x.storage.tape, x.numel, x.dtype
    out = tape.new(numel, dtype, label) if copied else Tensor(x.storage, numel, dtype)
    return tape.attach("expand", out, [x], [], lambda node, grads: [tape.new(small, dtype, GRADIENTS)])


def cat(parts: list[Tensor], numel: Size, label: str) -> Tensor:
    """``torch.cat``: a copy; its backward hands out views of the gradient."""
    tape = parts[0].storage.tape
    out = tape.new(numel, parts[0].dtype, label)
    sizes = [part.numel for part in parts]

    def backward(node: Node, grads: list[Tensor | None]) -> list[Tensor | None]:
        grad = grads[0]
        if grad is None:
            return [None for _ in sizes]
        views: list[Tensor | None] = []
        for size in sizes:
            narrowed = Tensor(grad.storage, size, grad.dtype)
            narrowed.is_view = True
            views.append(narrowed)
        return views

    return tape.attach("cat", out, list(parts), [], backward)


def split(x: Tensor, sizes: list[Size]) -> list[Tensor]:
    """``x.split(...)`` along the features: views; backward concatenates the parts' gradients (``split_backward``)."""
    tape, whole, dtype = x.storage.tape, x.numel, x.dtype
    outs = [Tensor(x.storage, size, dtype) for size in sizes]
    tape.attach("split", outs[0], [x], [], lambda node, grads: [tape.new(whole, dtype, GRADIENTS)])
    if outs[0].node is not None:
        outs[0].node.num_outputs = len(outs)
        for slot, out in enumerate(outs):
            out.node, out.slot = outs[0].node, slot
    return outs


def one_gradient(numel: Size, dtype: Dtype, label: str = GRADIENTS) -> Backward:
    """The backward of an operator with one input: its gradient is made while what was saved first is there."""

    def backward(node: Node, grads: list[Tensor | None]) -> list[Tensor | None]:
        held = node.unpack(0)
        result = held.storage.tape.new(numel, dtype, label)
        del held
        return [result]

    return backward
