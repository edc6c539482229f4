"""Scores and values: eager operators, a fused kernel, or the unfused path that the kernel falls back to."""

from __future__ import annotations

from vramplan.facts.architecture import Attention
from vramplan.facts.dtype import Dtype
from vramplan.memory import ops
from vramplan.memory.blocks.context import BlockContext, tokens
from vramplan.memory.blocks.rotary import CORE
from vramplan.memory.size import ZERO, Size, per_mask, per_score, per_token
from vramplan.memory.tape import Tensor

MASK = "causal mask"


def masks(ctx: BlockContext, attentions: list[Attention]) -> None:
    """One mask for all layers that see everything and one for those that slide (transformers/masking_utils.py).

    Eager attention adds them; fused kernels are told that the mask is causal unless sequences reach the window.
    """
    numel = per_score(1)
    has_window = any(block.sliding_window is not None for block in attentions)
    if ctx.attention == "eager":
        if any(block.sliding_window is None for block in attentions):
            ctx.tables.mask = ctx.tape.new(numel, ctx.dtype, MASK)
        if has_window:
            ctx.tables.window_mask = ctx.tape.new(numel, ctx.dtype, MASK)
    elif ctx.attention == "sdpa" and any(block.core == "falcon" for block in attentions):
        ctx.tables.mask = ctx.tape.new(per_mask(1), Dtype.BOOL, MASK)  # Falcon always has one
    elif ctx.attention == "sdpa" and ctx.windowed and has_window:
        ctx.tables.window_mask = ctx.tape.new(per_mask(1), Dtype.BOOL, MASK)


def attention_core(ctx: BlockContext, q: Tensor, k: Tensor, v: Tensor, block: Attention) -> Tensor:
    """Softmax attention of rotated queries and keys with values."""
    if ctx.attention == "eager":
        return _eager(ctx, q, k, v, block)
    mask = ctx.tables.window_mask if block.sliding_window is not None else None
    if mask is not None:
        k, v = to_all_heads(k, block), to_all_heads(v, block)
    return fused_core(ctx, q, k, v, block, mask)


def fused_core(ctx: BlockContext, q: Tensor, k: Tensor, v: Tensor, block: Attention, mask: Tensor | None) -> Tensor:
    """``scaled_dot_product_attention``: one kernel, but for dropout on the CPU."""
    if ctx.device == "cpu" and block.dropout > 0.0:
        return math_core(ctx, q, k, v, block)
    q, k, v = (ctx.low(part, CORE) for part in (q, k, v))
    lse = per_token(block.num_heads)
    scratch: Size = ZERO
    if ctx.device == "cuda":
        # FlashAttention-2's backward accumulates dq in fp32 and keeps one row sum a query and head
        # (flash_api.cpp, mha_bwd: dq_accum, softmax_d)
        scratch = per_token(block.q_width + block.num_heads)
    if mask is not None and mask.dtype is Dtype.BOOL:
        mask = ctx.tape.new(per_score(1), q.dtype, MASK)  # the kernel wants numbers: convert_boolean_attn_mask
    out = ops.flash_attention(q, k, v, lse, CORE, scratch, mask)
    if ctx.sequence_parallel > 1 or not joined(block):
        return out
    return ops.clone(out, CORE)  # the result lies in memory as the query does, whose heads come before positions


def joined(block: Attention) -> bool:
    """Whether queries and keys come out of a join, heads before positions in memory, and not as views of a
    projection (operators on one tensor keep its order, ``torch.cat`` does not)."""
    return block.rotary in ("sliced", "paired")


def whole_heads(ctx: BlockContext, x: Tensor) -> Tensor:
    """Heads of several sequences as ``torch.matmul`` wants them: a copy, as they lie between positions in memory."""
    return x if ctx.lone_sequence else ops.clone(x, CORE)


def to_all_heads(x: Tensor, block: Attention) -> Tensor:
    """``repeat_kv``."""
    return ops.spread(x, tokens(block.q_width), CORE) if block.num_heads > block.num_kv_heads else x


def _eager(ctx: BlockContext, q: Tensor, k: Tensor, v: Tensor, block: Attention) -> Tensor:
    """``eager_attention_forward``: repeated heads, scores, fp32 softmax, dropout, values."""
    wide, repeated = tokens(block.q_width), block.num_heads > block.num_kv_heads
    keys = to_all_heads(k, block)
    values = to_all_heads(v, block)
    weights = ops.scaled(_scores(ctx, q, keys, block, repeated), CORE)
    if block.softcap:
        weights = ops.scaled(weights, CORE)
        weights = ops.unary(weights, CORE, "result")
        weights = ops.scaled(weights, CORE)
    weights = ops.masked(weights, ctx.dtype, CORE)
    weights = ops.to(ops.softmax(weights, Dtype.FP32, ctx.device == "cuda", CORE), q.dtype, CORE)
    weights = ops.dropout(weights, block.dropout, ctx.device, CORE)
    ctx.returned = weights
    values = ctx.low(values, CORE)
    out = ops.matmul(ctx.low(weights, CORE), values if repeated else whole_heads(ctx, values), wide, CORE)
    return ops.clone(out, CORE)


def _scores(ctx: BlockContext, q: Tensor, keys: Tensor, block: Attention, repeated: bool) -> Tensor:
    """``query @ key.transpose(2, 3)``."""
    q, keys = ctx.low(q, CORE), ctx.low(keys, CORE)
    if not joined(block):
        q = whole_heads(ctx, q)
        keys = keys if repeated else whole_heads(ctx, keys)
    return ops.matmul(q, keys, per_score(block.num_heads), CORE)


def math_core(ctx: BlockContext, q: Tensor, k: Tensor, v: Tensor, block: Attention) -> Tensor:
    """The unfused path of ``scaled_dot_product_attention``, taken on the CPU with dropout and for fewer heads of keys
    than of queries that the kernel is not told of: everything in fp32
    (``aten/src/ATen/native/transformers/attention.cpp``, ``_scaled_dot_product_attention_math``)."""
    source, scores, wide = q.dtype, per_score(block.num_heads), tokens(block.q_width)
    spread = k.numel != q.numel
    wide_q, wide_k, wide_v = (ops.to(part, Dtype.FP32, CORE) for part in (q, k, v))
    scaled_q = ops.scaled(wide_q, CORE)
    mask = ctx.tape.new(per_mask(1), Dtype.FP32, CORE)
    scaled_k = ops.scaled(wide_k, CORE)
    keys = ops.spread(scaled_k, wide, CORE) if spread else ops.clone(scaled_k, CORE)
    weights = ops.matmul(ops.clone(scaled_q, CORE), keys, scores, CORE)
    del keys
    weights = ops.masked(weights, weights.dtype, CORE)
    weights = ops.softmax(weights, Dtype.FP32, True, CORE)
    weights = ops.dropout(weights, block.dropout, ctx.device, CORE)
    low = ops.to(weights, source, CORE)
    values = ops.spread(wide_v, wide, CORE) if spread else ops.clone(wide_v, CORE)
    out = ops.matmul(weights, values, wide, CORE)
    del low, mask, values
    return ops.clone(ops.to(out, source, CORE), CORE)
