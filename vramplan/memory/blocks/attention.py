"""Attention as transformers' decoder layers run it: projections cut into heads, rotary positions, a core."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from vramplan.facts.architecture import Attention
from vramplan.facts.dtype import Dtype
from vramplan.memory import ops
from vramplan.memory.blocks.bloom import bloom_core
from vramplan.memory.blocks.context import BlockContext, tokens
from vramplan.memory.blocks.core import attention_core
from vramplan.memory.blocks.falcon import falcon_core
from vramplan.memory.blocks.linear import project
from vramplan.memory.blocks.norm import normalise
from vramplan.memory.blocks.rotary import CORE, rotate_both
from vramplan.memory.blocks.ulysses import ulysses
from vramplan.memory.size import per_position
from vramplan.memory.tape import Tensor

PROJECTIONS = "attention projections"
_CORES = {"shared": attention_core, "bloom": bloom_core, "falcon": falcon_core}


def attend(
    ctx: BlockContext, x: Tensor, block: Attention, finish: Callable[[Tensor], Tensor] = lambda out: out
) -> Tensor:
    """``self_attn(x)`` (``LlamaAttention.forward``; ``GPT2Attention.forward`` where the projection is fused).

    ``finish``: what the module makes of its last projection while its names stand.
    """
    if block.fused_qkv:
        fused = project(ctx, x, block.projections[0], PROJECTIONS)
        ctx.frame.append(fused)
        q, k, v = _cut(fused, block)
        del fused
    else:
        q, k, v = _apart(ctx, x, block)
    if block.clip_qkv:
        q, k, v = ops.clamped(q, PROJECTIONS), ops.clamped(k, PROJECTIONS), ops.clamped(v, PROJECTIONS)
    if block.rotary_dim:
        q, k = rotate_both(ctx, q, k, block)
    if block.normed_late:
        q = _normed(ctx, q, block, 0)
        k = _normed(ctx, k, block, 1)
    if block.tempered:
        q = _tempered(ctx, q)
    core = partial(_CORES[block.core], ctx, block=block)
    out = ulysses(ctx, q, k, v, block, core) if ctx.sequence_parallel > 1 else core(q, k, v)
    projected = finish(project(ctx, ops.view(out), block.out, PROJECTIONS))
    del q, k, v  # named by the module until it returns
    ctx.frame.clear()
    return projected


def _apart(ctx: BlockContext, x: Tensor, block: Attention) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value from a projection each, and the norms of the first two."""
    q = _projected(ctx, x, block, 0)
    k = _projected(ctx, x, block, 1)
    v = ops.view(project(ctx, x, block.projections[block.order[2]], PROJECTIONS))
    if not (block.normed_late or block.normed_at_once):
        q = _normed(ctx, q, block, 0)
        k = _normed(ctx, k, block, 1)
    return q, k, v


def _projected(ctx: BlockContext, x: Tensor, block: Attention, which: int) -> Tensor:
    """One of the q and k projections as heads, normalised where the family does so before the next (Qwen3)."""
    projected = project(ctx, x, block.projections[block.order[which]], PROJECTIONS)
    if block.q_scaled and which == 0:
        projected = ops.scaled(projected, PROJECTIONS)
    projected = ops.view(projected)
    return _normed(ctx, projected, block, which) if block.normed_at_once else projected


def _normed(ctx: BlockContext, projected: Tensor, block: Attention, which: int) -> Tensor:
    norm = (block.q_norm, block.k_norm)[which]
    if norm is None:
        return projected
    heads = (block.num_heads, block.num_kv_heads)[which]
    over_whole = norm.num_heads is None and norm.width != block.head_dim
    return ops.view(normalise(ctx, projected, norm, rows=tokens(1 if over_whole else heads)))


def _tempered(ctx: BlockContext, q: Tensor) -> Tensor:
    """``(query * scales).to(dtype)`` with an fp32 factor a position (``attn_temperature_tuning``)."""
    ctx.frame.append(ctx.tape.new(per_position(1), Dtype.INT64, CORE))
    scales = ctx.tape.new(per_position(1), Dtype.FP32, CORE)
    ctx.frame.append(scales)
    return ops.to(ops.mul_broadcast(q, scales, CORE), q.dtype, CORE)


def _cut(fused: Tensor, block: Attention) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value out of one projection, as ``Attention.fused`` says."""
    widths = tokens(block.q_width), tokens(block.kv_width), tokens(block.kv_width)
    if block.fused == "split":
        q, k, v = ops.split(fused, list(widths))
    elif block.fused in ("slices", "select"):
        q, k, v = (ops.piece(fused, width) for width in widths)
    elif block.fused == "index":
        q, k, v = (
            ops.piece(fused, widths[0]),
            ops.gathered(fused, widths[1], PROJECTIONS),
            ops.gathered(fused, widths[2], PROJECTIONS),
        )
    else:
        q = ops.piece(fused, widths[0])
        k = ops.gathered(fused, widths[1], PROJECTIONS)
        v = ops.gathered(fused, widths[2], PROJECTIONS)
        q, k, v = ops.clone(q, CORE), ops.spread(k, widths[0], CORE), ops.spread(v, widths[0], CORE)
    return ops.view(q), ops.view(k), ops.view(v)
