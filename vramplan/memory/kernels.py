"""Operators that are one kernel and save what only they know of: statistics, masks, row sums.

Each mirrors the torch operator of its name (``tools/autograd/derivatives.yaml``, torch 2.13); ``ops`` hands them on.
"""

from __future__ import annotations

from vramplan.facts.dtype import Dtype
from vramplan.memory.leaf import Parameter
from vramplan.memory.size import Size
from vramplan.memory.tape import TEMPORARY as TEMPORARY
from vramplan.memory.tape import Node, Tape, Tensor
from vramplan.memory.views import GRADIENTS, one_gradient

WEIGHT_GRADIENT = "gradient of the weight in hand"


def embedding(tape: Tape, weight: Tensor, out_numel: Size, dtype: Dtype, label: str) -> Tensor:
    """``F.embedding``: its backward makes a dense gradient of the whole table (``embedding_dense_backward``)."""
    out = tape.new(out_numel, dtype, label)

    def backward(node: Node, grads: list[Tensor | None]) -> list[Tensor | None]:
        return [tape.new(weight.numel, dtype, WEIGHT_GRADIENT)]

    return tape.attach("embedding", out, [weight], [], backward)


def layer_norm(
    x: Tensor, weight: Parameter | None, bias: Parameter | None, rows: Size, statistics: Dtype, label: str
) -> Tensor:
    """``F.layer_norm``: one kernel; saves x and a mean and a reciprocal deviation a row (fp32 on CUDA, x's dtype on
    the CPU)."""
    tape, numel, dtype = x.storage.tape, x.numel, x.dtype
    out = tape.new(numel, dtype, label)
    mean = tape.new(rows, statistics, label)
    rstd = tape.new(rows, statistics, label)
    need_x = x.requires_grad

    def backward(node: Node, grads: list[Tensor | None]) -> list[Tensor | None]:
        held = [node.unpack(index) for index in range(len(node.saved))]
        grad_x = tape.new(numel, dtype, GRADIENTS) if need_x else None
        parts = [
            tape.new(param.numel, dtype, WEIGHT_GRADIENT) if param is not None and param.requires_grad else None
            for param in (weight, bias)
        ]
        del held
        return [grad_x, *parts]

    return tape.attach("layer_norm", out, [x, weight, bias], [x, mean, rstd], backward)


def dropout(x: Tensor, probability: float, device: str, label: str) -> Tensor:
    """``F.dropout``: nothing at p = 0 or in evaluation; else a result and a mask: bools on CUDA, where one kernel makes
    both, x's dtype on the CPU, where a product saves it before it runs (Dropout.cpp, ``_dropout_impl``)."""
    if probability == 0.0 or not x.storage.tape.training:
        return x
    tape, numel, dtype = x.storage.tape, x.numel, x.dtype
    mask = tape.new(numel, Dtype.BOOL if device == "cuda" else dtype, label)
    if device == "cuda":
        return tape.attach("dropout", tape.new(numel, dtype, label), [x], [mask], one_gradient(numel, dtype))
    node = tape.record("dropout", [x], [mask], one_gradient(numel, dtype))
    out = tape.new(numel, dtype, label)
    out.node = node
    return out


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Size,
    label: str,
    backward_scratch: Size,
    mask: Tensor | None = None,
    out_numel: Size | None = None,
) -> Tensor:
    """A fused attention kernel: saves q, k, v, its result, its mask and one fp32 log-sum-exp a row and head.

    ``backward_scratch``: fp32 elements that the kernel's backward makes besides the three gradients. ``out_numel``:
    elements of the result where values have another width than queries.
    """
    tape = q.storage.tape
    out = tape.new(out_numel if out_numel is not None else q.numel, q.dtype, label)
    log_sum_exp = tape.new(lse, Dtype.FP32, label)
    sizes, dtype = [q.numel, k.numel, v.numel], q.dtype

    def backward(node: Node, grads: list[Tensor | None]) -> list[Tensor | None]:
        held = [node.unpack(index) for index in range(len(node.saved))]
        results: list[Tensor | None] = [tape.new(numel, dtype, GRADIENTS) for numel in sizes]
        scratch = tape.new(backward_scratch, Dtype.FP32, TEMPORARY)
        del held, scratch
        return results

    return tape.attach(
        "attention", out, [q, k, v], [q, k, v, out, log_sum_exp, *([mask] if mask is not None else [])], backward
    )


def nll_loss(log_probabilities: Tensor, targets: Tensor, label: str) -> Tensor:
    """``nll_loss`` (mean): saves its input and the targets; backward fills a whole tensor with the gradient."""
    tape, numel, dtype = log_probabilities.storage.tape, log_probabilities.numel, log_probabilities.dtype
    out = tape.new((1, 0, 0, 0, 0), dtype, label)

    return tape.attach("nll_loss", out, [log_probabilities], [log_probabilities, targets], one_gradient(numel, dtype))
