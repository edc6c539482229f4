"""DeepSeek's latent attention: queries, keys and values out of narrow projections, one rotated part for all keys."""

from __future__ import annotations

from vramplan.facts.architecture import LatentAttention, Norm
from vramplan.memory import ops
from vramplan.memory.blocks.context import BlockContext, tokens
from vramplan.memory.blocks.core import attention_core
from vramplan.memory.blocks.linear import project
from vramplan.memory.blocks.norm import normalise
from vramplan.memory.blocks.rotary import CORE, rotate_latent
from vramplan.memory.tape import Tensor

PROJECTIONS = "attention projections"


def attend_latent(ctx: BlockContext, x: Tensor, block: LatentAttention) -> Tensor:
    """``DeepseekV3Attention.forward``, ``DeepseekV2Attention.forward``."""
    heads = block.num_heads
    states = ops.to_heads(_queries(ctx, x, block))
    passed, q = ops.split(states, [tokens(heads * block.nope_head_dim), tokens(heads * block.rotary_dim)])
    down, norm, _ = block.keys_values
    compressed = project(ctx, x, down, PROJECTIONS)
    narrow, k = ops.split(compressed, [tokens(block.kv_rank), tokens(block.rotary_dim)])
    narrow = ops.view(normalise(ctx, narrow, norm))
    q, k = rotate_latent(ctx, q, ops.view(k), block)
    queries = ops.cat([ops.to(passed, q.dtype, CORE), q], tokens(block.q_width), CORE)
    keys, values = _expanded(ctx, narrow, k, block)
    out = attention_core(ctx, queries, keys, values, block)
    return project(ctx, ops.view(out), block.out, PROJECTIONS)


def _queries(ctx: BlockContext, x: Tensor, block: LatentAttention) -> Tensor:
    """``q_b_proj(q_a_layernorm(q_a_proj(x)))``, or one projection."""
    for part in block.query:
        x = normalise(ctx, x, part) if isinstance(part, Norm) else project(ctx, x, part, PROJECTIONS)
    return x


def _expanded(ctx: BlockContext, narrow: Tensor, k: Tensor, block: LatentAttention) -> tuple[Tensor, Tensor]:
    """``expand_kv``: keys and values of every head; the rotated part of the keys is the same in all."""
    heads = block.num_heads
    up = block.keys_values[2]
    both = ops.to_heads(project(ctx, narrow, up, PROJECTIONS))
    passed, values = ops.split(both, [tokens(heads * block.nope_head_dim), tokens(heads * block.v_head_dim)])
    k = ops.spread(k, tokens(heads * block.rotary_dim), CORE, copied=False)
    return ops.placed([passed, k], tokens(block.q_width), CORE), values
