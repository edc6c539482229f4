"""Eager attention with one more learned score a head (gpt-oss), and rotary positions on the halves of each head."""

from __future__ import annotations

from vramplan.facts.architecture import Attention
from vramplan.facts.dtype import Dtype
from vramplan.memory import ops, routed
from vramplan.memory.blocks.context import BlockContext, tokens
from vramplan.memory.leaf import Parameter
from vramplan.memory.size import Size, add, per_score
from vramplan.memory.tape import Node, Tensor

CORE = "attention core"


def sink_weights(ctx: BlockContext, scores: Tensor, block: Attention) -> Tensor:
    """Softmax over scores and sinks, the sinks' part cut off (``gpt_oss``'s ``eager_attention_forward``)."""
    wide = add(per_score(block.num_heads), tokens(block.num_heads))
    name = f"{block.out.name.rpartition('.')[0]}.sinks"
    sinks = _spread(ctx.parameter(name, block.num_heads), tokens(block.num_heads))
    combined = ops.cat([scores, sinks], wide, CORE)
    combined = ops.sub_broadcast(combined, _highest(combined, tokens(block.num_heads)), CORE)
    probabilities = ops.softmax(combined, combined.dtype, ctx.device, CORE)
    ctx.frame.append(combined)  # named until the function returns
    return ops.piece(probabilities, per_score(block.num_heads))


def weighed(ctx: BlockContext, weights: Tensor, values: Tensor, numel: Size) -> Tensor:
    """``torch.matmul(weights, values)`` of weights with gaps between rows, which the CPU's kernels for low precision
    copy."""
    copied = ctx.device == "cpu" and weights.dtype is not Dtype.FP32 and ctx.autocast is None
    copy = ctx.tape.new(weights.numel, weights.dtype, ops.TEMPORARY) if copied else None
    out = ops.matmul(*ctx.both_low(CORE, weights, values), numel, CORE)
    del copy
    return out


def _spread(sinks: Parameter, numel: Size) -> Tensor:
    """``sinks.reshape(1, -1, 1, 1).expand(...)``: a view; its gradient is summed."""
    tape, small, dtype = sinks.storage.tape, sinks.numel, sinks.dtype
    out = Tensor(sinks.storage, numel, dtype)
    return tape.attach("expand", out, [sinks], [], lambda node, grads: [tape.new(small, dtype, ops.WEIGHT_GRADIENT)])


def _highest(x: Tensor, rows: Size) -> Tensor:
    """``x.max(dim=-1, keepdim=True).values``: saves where they are; backward scatters into zeros of x's shape."""
    tape, numel, dtype = x.storage.tape, x.numel, x.dtype
    values = tape.new(rows, dtype, CORE)
    where = tape.new(rows, Dtype.INT64, CORE)

    def backward(node: Node, grads: list[Tensor | None]) -> list[Tensor | None]:
        held = node.unpack(0)
        result = routed.scattered(tape, numel, dtype)
        del held
        return [result]

    return tape.attach("max", values, [x], [where], backward)


def rotate_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``cat((a * cos - b * sin, b * cos + a * sin))`` of the two halves of each head (``_apply_rotary_emb``)."""
    half = ops.resized(x.numel, 1, 2)
    first, second = ops.split(x, [half, half])
    turned = _less(ops.mul_broadcast(first, cos, CORE), ops.mul_broadcast(second, sin, CORE))
    other = ops.add(ops.mul_broadcast(second, cos, CORE), ops.mul_broadcast(first, sin, CORE), CORE)
    return ops.cat([turned, other], x.numel, CORE)


def _less(a: Tensor, b: Tensor) -> Tensor:
    """``a - b`` of equal shapes: the second gets the negated gradient."""
    tape, numel, dtype = a.storage.tape, a.numel, a.dtype
    out = tape.new(numel, dtype, CORE)

    def backward(node: Node, grads: list[Tensor | None]) -> list[Tensor | None]:
        return [grads[0], tape.new(numel, dtype, ops.GRADIENTS)]

    return tape.attach("sub", out, [a, b], [], backward)
