"""Attention as transformers' decoder layers run it: projections, rotary positions, and one of three cores."""

from __future__ import annotations

from vramplan.facts.architecture import Attention
from vramplan.facts.dtype import Dtype
from vramplan.memory import ops
from vramplan.memory.blocks.context import BlockContext, Module, tokens
from vramplan.memory.blocks.linear import project
from vramplan.memory.blocks.norm import normalise
from vramplan.memory.blocks.ulysses import ulysses
from vramplan.memory.size import Size, per_mask, per_position, per_score, per_token
from vramplan.memory.tape import Tensor

CORE = "attention core"
PROJECTIONS = "attention projections"


def attend(ctx: BlockContext, x: Tensor, block: Attention) -> Tensor:
    """``self_attn(x)`` (``LlamaAttention.forward``; ``GPT2Attention.forward`` where the projection is fused)."""
    if block.fused_qkv:
        fused = project(ctx, x, block.projections[0], PROJECTIONS)
        q, k, v = ops.split(fused, [tokens(block.q_width), tokens(block.kv_width), tokens(block.kv_width)])
        del fused
        q, k, v = ops.view(q), ops.view(k), ops.view(v)
    else:
        q = _heads(ctx, x, block, 0)
        k = _heads(ctx, x, block, 1)
        v = ops.view(project(ctx, x, block.projections[2], PROJECTIONS))
    if block.rotary_dim:
        q, k = _rotate_both(ctx, q, k, block)
    if ctx.sequence_parallel > 1:
        out = ulysses(ctx, q, k, v, block, lambda q, k, v: _core(ctx, q, k, v, block))
    else:
        out = _core(ctx, q, k, v, block)
    del q, k, v
    out = ops.view(out)
    return project(ctx, out, block.out, PROJECTIONS)


def _heads(ctx: BlockContext, x: Tensor, block: Attention, which: int) -> Tensor:
    """One of the q and k projections as heads, normalised a head where the family does (Qwen3)."""
    projected = ops.view(project(ctx, x, block.projections[which], PROJECTIONS))
    norm = (block.q_norm, block.k_norm)[which]
    if norm is None:
        return projected
    heads = (block.num_heads, block.num_kv_heads)[which]
    return ops.view(normalise(ctx, projected, norm, rows=tokens(heads)))


def rotary_tables(ctx: BlockContext, rotary_dim: int) -> None:
    """``cos`` and ``sin`` for every position, shared by layers and by the batch (``LlamaRotaryEmbedding.forward``)."""
    label = "rotary tables"
    module = Module("model.rotary_emb", ())
    if ctx.hooks is not None:
        ctx.hooks.before_forward(module)
    numel = per_position(rotary_dim)
    frequencies = ctx.tape.new(per_position(rotary_dim // 2), Dtype.FP32, label)
    angles = ctx.tape.new(numel, Dtype.FP32, label)
    del frequencies
    wide_cos = ctx.tape.new(numel, Dtype.FP32, label)
    wide_sin = ctx.tape.new(numel, Dtype.FP32, label)
    ctx.rotary = (ops.to(wide_cos, ctx.dtype, label), ops.to(wide_sin, ctx.dtype, label))
    del angles, wide_cos, wide_sin
    if ctx.hooks is not None:
        ctx.hooks.after_forward(module)


def causal_mask(ctx: BlockContext) -> None:
    """The additive mask that eager attention needs, one for all layers (transformers/masking_utils.py,
    ``eager_mask``); fused kernels are told that the mask is causal instead."""
    if ctx.attention == "eager":
        ctx.mask = ctx.tape.new(per_mask(1), ctx.dtype, "causal mask")


def _rotate_both(ctx: BlockContext, q: Tensor, k: Tensor, block: Attention) -> tuple[Tensor, Tensor]:
    rotated_q = _rotate(ctx, q)
    rotated_k = _rotate(ctx, k)
    return rotated_q, rotated_k


def _rotate(ctx: BlockContext, x: Tensor) -> Tensor:
    """``(x * cos) + (rotate_half(x) * sin)``."""
    assert ctx.rotary is not None
    cos, sin = ctx.rotary
    straight = ops.mul_broadcast(x, cos, CORE)
    turned = ops.mul_broadcast(_rotate_half(x), sin, CORE)
    return ops.add(straight, turned, CORE)


def _rotate_half(x: Tensor) -> Tensor:
    """``cat((-x2, x1))`` of the two halves of each head."""
    half = ops.resized(x.numel, 1, 2)
    first = ops.piece(x, half)
    second = ops.piece(x, half)
    return ops.cat([ops.unary(second, CORE, "nothing"), first], x.numel, CORE)


def _core(ctx: BlockContext, q: Tensor, k: Tensor, v: Tensor, block: Attention) -> Tensor:
    if ctx.attention == "eager":
        return _eager(ctx, q, k, v, block)
    q, k, v = (_low(ctx, part) for part in (q, k, v))
    if ctx.device == "cpu" and block.dropout > 0.0:
        return _math(ctx, q, k, v, block)
    lse = per_token(block.num_heads)
    scratch: Size = (0, 0, 0, 0, 0)
    if ctx.device == "cuda":
        # FlashAttention-2's backward accumulates dq in fp32 and keeps one row sum a query and head
        # (flash_api.cpp, mha_bwd: dq_accum, softmax_d)
        scratch = per_token(block.q_width + block.num_heads)
    return ops.flash_attention(q, k, v, lse, CORE, scratch)


def _eager(ctx: BlockContext, q: Tensor, k: Tensor, v: Tensor, block: Attention) -> Tensor:
    """``eager_attention_forward``: repeated heads, scores, fp32 softmax, dropout, values."""
    repeats = block.num_heads // block.num_kv_heads
    wide = tokens(block.q_width)
    keys = _repeat(k, wide) if repeats > 1 else k
    values = _repeat(v, wide) if repeats > 1 else v
    scores = per_score(block.num_heads)
    weights = ops.scaled(_score(_low(ctx, q), _low(ctx, keys), scores), CORE)
    # under autocast the mask has the format of the residual stream, and the sum the wider of the two
    weights = ops.masked(weights, CORE) if ctx.autocast is None else ops.to(weights, ctx.dtype, CORE)
    weights = ops.to(ops.softmax(weights, Dtype.FP32, ctx.device == "cuda", CORE), q.dtype, CORE)
    weights = ops.dropout(weights, block.dropout, ctx.device, CORE)
    out = ops.matmul(_low(ctx, weights), _low(ctx, values), wide, CORE)
    return ops.clone(out, CORE)


def _low(ctx: BlockContext, x: Tensor) -> Tensor:
    """Autocast's copy of what goes into a matrix product or a fused core (rotary tables in fp32 widen q and k)."""
    return ops.to(x, ctx.autocast, CORE) if ctx.autocast is not None else x


def _score(q: Tensor, keys: Tensor, scores: Size) -> Tensor:
    return ops.matmul(q, keys, scores, CORE)


def _repeat(x: Tensor, numel: Size) -> Tensor:
    """``repeat_kv``: an expanded view made whole; backward sums the copies into one tensor."""
    tape, small, dtype = x.storage.tape, x.numel, x.dtype
    out = tape.new(numel, dtype, CORE)
    return tape.attach("repeat", out, [x], [], lambda node, grads: [tape.new(small, dtype, ops.GRADIENTS)])


def _math(ctx: BlockContext, q: Tensor, k: Tensor, v: Tensor, block: Attention) -> Tensor:
    """The unfused path that ``scaled_dot_product_attention`` takes on the CPU with dropout: everything in fp32
    (``aten/src/ATen/native/transformers/attention.cpp``, ``_scaled_dot_product_attention_math``)."""
    source, scores = q.dtype, per_score(block.num_heads)
    wide_q, wide_k, wide_v = (ops.to(part, Dtype.FP32, CORE) for part in (q, k, v))
    scaled_q = ops.scaled(wide_q, CORE)
    mask = ctx.tape.new(per_mask(1), Dtype.FP32, CORE)
    scaled_k = ops.scaled(wide_k, CORE)
    weights = ops.matmul(ops.clone(scaled_q, CORE), ops.clone(scaled_k, CORE), scores, CORE)
    weights = ops.masked(weights, CORE)
    weights = ops.softmax(weights, Dtype.FP32, True, CORE)
    weights = ops.dropout(weights, block.dropout, ctx.device, CORE)
    low = ops.to(weights, source, CORE)
    out = ops.matmul(weights, ops.clone(wide_v, CORE), tokens(block.q_width), CORE)
    del low, mask
    return ops.to(out, source, CORE)
