"""One decoder layer: the order of norms, attention, MLP and residual additions."""

from __future__ import annotations

from vramplan.facts.architecture import DecoderLayer, GatedMLP
from vramplan.memory import ops
from vramplan.memory.blocks.attention import attend
from vramplan.memory.blocks.context import BlockContext
from vramplan.memory.blocks.mlp import gated, plain
from vramplan.memory.blocks.norm import normalise
from vramplan.memory.tape import Tensor

RESIDUAL = "residual stream"


def run_layer(ctx: BlockContext, x: Tensor, layer: DecoderLayer) -> Tensor:
    """``decoder_layer(x)``, pre-norm and sequential (``LlamaDecoderLayer.forward``, ``GPT2Block.forward``)."""
    first, second = layer.norms
    residual = x
    x = normalise(ctx, x, first)
    x = ctx.call("self_attn", (), lambda x: attend(ctx, x, layer.attention), x, positional=False)
    x = ops.dropout(x, layer.residual_dropout, ctx.device, RESIDUAL)
    x = ops.add(residual, x, RESIDUAL)
    residual = x
    x = normalise(ctx, x, second)
    mlp = layer.mlp
    x = ctx.call("mlp", (), lambda x: gated(ctx, x, mlp) if isinstance(mlp, GatedMLP) else plain(ctx, x, mlp), x)
    return ops.add(residual, x, RESIDUAL)
