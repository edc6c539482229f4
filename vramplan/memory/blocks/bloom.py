"""What BLOOM writes in its own way: ALiBi's bias inside the product of queries and keys, its GELU."""

from __future__ import annotations

from collections.abc import Callable

from vramplan.facts.architecture import Attention
from vramplan.facts.dtype import Dtype
from vramplan.memory import ops
from vramplan.memory.blocks.context import BlockContext, tokens
from vramplan.memory.blocks.rotary import CORE
from vramplan.memory.size import per_score
from vramplan.memory.tape import Node, Tensor


def bloom_core(ctx: BlockContext, q: Tensor, k: Tensor, v: Tensor, block: Attention) -> Tensor:
    """``BloomAttention.forward`` between its two projections; every intermediate has a name of its own there."""
    if not ctx.lone_sequence:
        q, k, v = (ops.clone(part, CORE) for part in (q, k, v))
    source = q.dtype
    scores = ops.matmul(*ctx.both_low(CORE, q, k), per_score(block.num_heads), CORE, scaled=True)
    assert ctx.tables.mask is not None
    weights = ops.masked(scores, ctx.tables.mask, CORE)
    probabilities = ops.to(ops.softmax(weights, Dtype.FP32, ctx.device, CORE), source, CORE)
    dropped = ctx.dropout(probabilities, block.dropout, CORE, "self_attention.attention_dropout")
    ctx.returned = dropped
    out = ops.matmul(*ctx.both_low(CORE, dropped, v), tokens(block.q_width), CORE)
    ctx.frame += [q, k, v, scores, weights]
    merged = ops.clone(out, CORE)
    del out
    return merged


def bloom_gelu(x: Tensor, label: str) -> Tensor:
    """``GeLUFunction``: one node that saves its input; the formula's operators run one at a time both ways.

    Forward: ``x * 0.5 * (1.0 + tanh(0.79788456 * x * (1 + 0.044715 * x * x)))``.
    """
    tape, numel, dtype = x.storage.tape, x.numel, x.dtype

    def new() -> Tensor:
        return tape.new(numel, dtype, label)

    half = new()
    inner = _tanh(new)
    inner = new()
    out = new()
    del half, inner

    def backward(node: Node, grads: list[Tensor | None]) -> list[Tensor | None]:
        held = node.unpack(0)
        factor = _gelu_factor(lambda: tape.new(numel, dtype, ops.TEMPORARY))
        result = tape.new(numel, dtype, ops.GRADIENTS)
        del held, factor
        return [result]

    return tape.attach("bloom_gelu", out, [x], [x], backward)


def _tanh(new: Callable[[], Tensor]) -> Tensor:
    """``tanh(0.79788456 * x * (1 + 0.044715 * x * x))``: each name is let go of when the next stands for it."""
    scaled = new()
    bracket = new()
    bracket = new()
    bracket = new()
    product = new()
    del scaled, bracket
    result = new()
    del product
    return result


def _gelu_factor(new: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """``0.5 * x * ((1 - tanh * tanh) * (0.79788456 + 0.1070322243 * x * x)) + 0.5 * (1 + tanh)``, and the tanh."""
    tanh = _tanh(new)
    half = new()
    slope = new()
    slope = new()
    bracket = new()
    bracket = new()
    bracket = new()
    product = new()
    del slope, bracket
    scaled = new()
    del product, half
    shifted = new()
    shifted = new()
    total = new()
    del scaled, shifted
    return tanh, total
