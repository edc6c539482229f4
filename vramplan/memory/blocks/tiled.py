"""A gated MLP over a stretch of tokens at a time: only the block's input is kept, and backward runs each stretch again.

Code: deepspeed/runtime/sequence_parallel/ulysses_sp.py, ``TiledMLP``. Every stretch has the same instants, so one of
them is run; while there are more, the gradients of the block's weights are whole beside it (``ds_grad_is_ready``).
"""

from __future__ import annotations

from vramplan.facts.architecture import GatedMLP, Linear
from vramplan.memory import ops
from vramplan.memory.blocks.context import BlockContext
from vramplan.memory.blocks.linear import product
from vramplan.memory.blocks.mlp import MLP, activate
from vramplan.memory.size import const
from vramplan.memory.tape import Node, Tensor


def tiled(ctx: BlockContext, x: Tensor, block: GatedMLP, owner: str) -> Tensor:
    """``TiledMLP.apply(mlp_forward, mlp, x, shards, weights)``."""
    tape, prefix, numel, dtype = ctx.tape, ctx.prefix, x.numel, x.dtype
    with tape.without_graph():
        outputs = tape.new(numel, dtype, MLP)  # of every stretch
        _stretch(ctx, _part(ctx, x), block, owner)
        out = tape.new(numel, dtype, MLP)
        del outputs

    def backward(node: Node, grads: list[Tensor | None]) -> list[Tensor | None]:
        held, incoming = node.unpack(0), grads[0]
        assert incoming is not None
        gradient = tape.new(numel, dtype, ops.GRADIENTS)
        weights = [param for linear in block.projections for param in ctx_parameters(linear) if param.requires_grad]
        summed = [tape.new(param.numel, param.dtype, ops.WEIGHT_GRADIENT) for param in weights]
        before = ctx.prefix, ctx.flat, tape.in_first_forward
        ctx.prefix, ctx.flat, tape.in_first_forward = prefix, True, True
        part = tape.leaf(_part(ctx, held))
        result = _stretch(ctx, part, block, owner)
        tape.in_first_forward = False
        tape.backward(result, _part(ctx, incoming))
        ctx.prefix, ctx.flat, tape.in_first_forward = before
        del held, part, result, summed
        return [gradient]

    def ctx_parameters(linear: Linear) -> list[Tensor]:
        before, ctx.prefix = ctx.prefix, prefix
        params = [param for param in ctx.linear_parameters(linear) if param is not None]
        ctx.prefix = before
        return list(params)

    return tape.attach("tiled_mlp", out, [x], [x], backward)


def _part(ctx: BlockContext, x: Tensor) -> Tensor:
    """A stretch of x: the same bytes."""
    return Tensor(x.storage, const(ctx.tile_rows * _width(x)), x.dtype)


def _width(x: Tensor) -> int:
    """Features of a token."""
    return x.numel[1]


def _stretch(ctx: BlockContext, x: Tensor, block: GatedMLP, owner: str) -> Tensor:
    """``down_proj(act_fn(gate_proj(x)) * up_proj(x))``."""
    gate, up, down = block.projections
    return _linear(
        ctx,
        ops.mul(activate(ctx, _linear(ctx, x, gate), block.activation, owner), _linear(ctx, x, up), MLP),
        down,
    )


def _linear(ctx: BlockContext, x: Tensor, linear: Linear) -> Tensor:
    weight, bias = ctx.linear_parameters(linear)
    numel = const(ctx.tile_rows * linear.out_features)
    return ctx.call(linear.name, (weight, bias), lambda x: product(ctx, x, weight, bias, numel, MLP), x)
