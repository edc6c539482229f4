"""Falcon's attention, which calls the kernel itself; with ALiBi its bias is part of the mask."""

from __future__ import annotations

from vramplan.facts.architecture import Attention
from vramplan.facts.dtype import Dtype
from vramplan.memory import ops
from vramplan.memory.blocks.context import BlockContext, tokens
from vramplan.memory.blocks.core import fused_core, math_core, one_to_all, whole_heads, without_padding
from vramplan.memory.blocks.rotary import CORE
from vramplan.memory.size import per_score
from vramplan.memory.tape import Tensor


def falcon_core(ctx: BlockContext, q: Tensor, k: Tensor, v: Tensor, block: Attention) -> Tensor:
    """``FalconAttention.forward`` between its two projections."""
    if ctx.attention != "eager":
        if ctx.attention == "sdpa" and k.numel != q.numel:  # not told of grouped heads: the unfused path repeats them
            return math_core(ctx, q, k, v, block, ctx.tables.mask)
        if ctx.attention == "flash_attention_2" and ctx.masked:
            return without_padding(ctx, q, k, v, block)
        return fused_core(ctx, q, k, v, block, ctx.tables.mask)
    low_q, low_k = ctx.all_low(CORE, q, k)
    scores = ops.matmul(_all(ctx, low_q, q), _all(ctx, low_k, q), per_score(block.num_heads), CORE)
    del low_q, low_k
    if block.alibi:
        scores = _with_bias(ctx, scores)
    assert ctx.tables.mask is not None
    biased = ops.masked(scores, ctx.tables.mask, CORE)  # an argument, held until softmax returns
    weights = ops.softmax(ops.to(biased, ctx.dtype, CORE), ctx.dtype, ctx.device, CORE)
    del biased
    if block.alibi:
        weights = ctx.dropout(weights, block.dropout, CORE, "self_attention.attention_dropout")
    ctx.returned = weights
    weights, low_v = ctx.all_low(CORE, weights, v)
    out = ops.matmul(weights, _all(ctx, low_v, q), tokens(block.q_width), CORE)
    del low_v
    return ops.clone(out, CORE)


def _all(ctx: BlockContext, x: Tensor, q: Tensor) -> Tensor:
    """Heads as ``torch.matmul`` wants them: the one key/value head of all queries is copied to each."""
    return whole_heads(ctx, x) if x.numel == q.numel else one_to_all(ctx, x, q.numel)


def _with_bias(ctx: BlockContext, scores: Tensor) -> Tensor:
    """Scores in fp32 plus ALiBi, scaled in place; the gradient is scaled into a new tensor."""
    ctx.frame.append(scores)
    wide = ops.to(scores, Dtype.FP32, CORE)
    biased = ops.shifted(wide, CORE)
    ctx.frame += [wide, biased]
    tape, numel = ctx.tape, biased.numel
    out = Tensor(biased.storage, numel, Dtype.FP32)
    return tape.attach("scale", out, [biased], [], lambda *_: [tape.new(numel, Dtype.FP32, ops.GRADIENTS)])
