"""One decoder layer: the order of norms, attention, MLP and residual additions."""

from __future__ import annotations

from collections.abc import Callable

from vramplan.facts.architecture import (
    Attention,
    DecoderLayer,
    GatedMLP,
    LatentAttention,
    MixtureOfExperts,
    Norm,
    PlainMLP,
)
from vramplan.memory import ops
from vramplan.memory.blocks.attention import attend
from vramplan.memory.blocks.context import BlockContext
from vramplan.memory.blocks.latent import attend_latent
from vramplan.memory.blocks.linear import project
from vramplan.memory.blocks.mixture import mixture, mixture_parameters
from vramplan.memory.blocks.mlp import MLP, activate, gated, plain
from vramplan.memory.blocks.norm import normalise
from vramplan.memory.blocks.tiled import tiled
from vramplan.memory.tape import Tensor

RESIDUAL = "residual stream"


def call_layer(ctx: BlockContext, x: Tensor, layer: DecoderLayer) -> Tensor:
    """The layer as a module of the model; as one that is gathered whole where the threshold says so."""
    if ctx.leaves == "layers":
        params = tuple(ctx.parameter(tensor.name, tensor.numel) for tensor in layer.tensors())
        return ctx.call_leaf("layer", params, lambda x: run_layer(ctx, x, layer), x)
    return ctx.call("layer", (), lambda x: run_layer(ctx, x, layer), x)


def run_layer(ctx: BlockContext, x: Tensor, layer: DecoderLayer) -> Tensor:
    """``decoder_layer(x)`` in the layer's arrangement (``DecoderLayer.residual``)."""
    x = _ARRANGEMENTS[layer.residual](ctx, x, layer)
    if layer.mixer.core != "shared":
        if ctx.tape.in_first_forward:
            ctx.output = ctx.returned
        else:
            ctx.recomputed = ctx.returned
    ctx.returned = None
    return x


def _attention(
    ctx: BlockContext, x: Tensor, layer: DecoderLayer, finish: Callable[[Tensor], Tensor] = lambda out: out
) -> Tensor:
    mixer = layer.mixer

    def run(x: Tensor) -> Tensor:
        return attend_latent(ctx, x, mixer) if isinstance(mixer, LatentAttention) else attend(ctx, x, mixer, finish)

    has_sinks = isinstance(mixer, Attention) and mixer.sinks
    own = (ctx.parameter("self_attn.sinks", mixer.num_heads),) if has_sinks else ()
    return ctx.call("self_attn", own, run, x, positional=False)


def _mlp(ctx: BlockContext, x: Tensor, layer: DecoderLayer) -> Tensor:
    block = layer.feed_forward
    if isinstance(block, MixtureOfExperts) and ctx.leaves == "mixtures":
        return ctx.call_leaf(
            layer.feed_forward_name, mixture_parameters(ctx, block), lambda x: mixture(ctx, x, block), x
        )
    name = layer.feed_forward_name
    return ctx.call(name, (), lambda x: _feed_forward(ctx, x, block, name), x)


def _feed_forward(ctx: BlockContext, x: Tensor, block: GatedMLP | PlainMLP | MixtureOfExperts, name: str) -> Tensor:
    if isinstance(block, MixtureOfExperts):
        return mixture(ctx, x, block)
    if isinstance(block, PlainMLP):
        return plain(ctx, x, block)
    return tiled(ctx, x, block, name) if ctx.tile_rows else gated(ctx, x, block, name)


def _attention_branch(ctx: BlockContext, x: Tensor, layer: DecoderLayer) -> Tensor:
    """Attention and what is done to it before it is added: dropout, a constant."""
    x = _attention(ctx, x, layer)
    if layer.drops_attention:
        x = ctx.dropout(x, layer.residual_dropout, RESIDUAL, layer.dropout_modules[0])
    return ops.scaled(x, RESIDUAL) if layer.residual_scaled else x


def _mlp_branch(ctx: BlockContext, x: Tensor, layer: DecoderLayer) -> Tensor:
    """The MLP and what is done to it before it is added, if it has no dropout of its own."""
    x = _mlp(ctx, x, layer)
    block = layer.feed_forward
    if not (isinstance(block, PlainMLP) and (block.dropout or block.dropout_module)):
        x = ctx.dropout(x, layer.residual_dropout, RESIDUAL, layer.dropout_modules[1])
    return ops.scaled(x, RESIDUAL) if layer.residual_scaled else x


def _own_mlp(ctx: BlockContext, x: Tensor, norm: Norm | None, layer: DecoderLayer) -> Tensor:
    """``OPTDecoderLayer.forward``: the layer calls the linears itself, on a matrix of all tokens, and one name stands
    for each result in turn: the norm's is let go of as soon as the first linear returns (modeling_opt.py, lines 232 to
    245)."""
    block = layer.feed_forward
    assert isinstance(block, PlainMLP)
    ctx.flat = True
    try:
        x = normalise(ctx, x, norm) if norm is not None else x
        x = project(ctx, x, block.projections[0], MLP)
        x = activate(ctx, x, block.activation)
        x = project(ctx, x, block.projections[1], MLP)
    finally:  # recomputing can end in the middle
        ctx.flat = False
    return ops.dropout(x, layer.residual_dropout, ctx.device, RESIDUAL)


def _sequential(ctx: BlockContext, x: Tensor, layer: DecoderLayer) -> Tensor:
    """``LlamaDecoderLayer.forward``, ``GPT2Block.forward``."""
    first, second = layer.norms
    residual = x
    normed = normalise(ctx, x, first)
    x = _attention_branch(ctx, normed, layer)
    named = {"": [], "result": [x], "input and result": [normed, x]}[layer.names_attention]
    del normed
    x = ops.add(residual, x, RESIDUAL)
    residual = x
    if layer.feed_forward_name:
        x = normalise(ctx, x, second)
        x = _mlp_branch(ctx, x, layer)
    else:
        x = _own_mlp(ctx, x, second, layer)
    x = ops.add(residual, ops.view(x) if layer.views_result else x, RESIDUAL)
    named.clear()
    return x


def _parallel(ctx: BlockContext, x: Tensor, layer: DecoderLayer) -> Tensor:
    """``PhiDecoderLayer.forward`` (one norm for both), ``GPTNeoXLayer.forward`` (one for each); in turn:
    ``CohereDecoderLayer.forward``."""
    first, second = layer.norms[0], layer.norms[-1]
    normed = normalise(ctx, x, first)
    also_normed = normalise(ctx, x, second) if second is not first and layer.norms_first else normed
    attended = _attention_branch(ctx, normed, layer)
    if second is not first and not layer.norms_first:
        also_normed = normalise(ctx, x, second)
    if not layer.norms_first:  # else it has a name of its own (``attention_layernorm_out``)
        del normed
    mixed = _mlp_branch(ctx, also_normed, layer)
    if layer.residual == "in_turn":
        return ops.add(ops.add(x, attended, RESIDUAL), mixed, RESIDUAL)
    both = ops.add(mixed, attended, RESIDUAL, in_place=layer.norms_first)
    return ops.add(x, both, RESIDUAL)


def _post(ctx: BlockContext, x: Tensor, layer: DecoderLayer) -> Tensor:
    """``OPTDecoderLayer.forward`` of OPT-350m."""
    first, second = layer.norms
    residual = x
    x = ops.add(residual, _attention_branch(ctx, x, layer), RESIDUAL)
    x = normalise(ctx, x, first)
    residual = x
    x = ops.add(residual, _own_mlp(ctx, x, None, layer), RESIDUAL)
    return normalise(ctx, x, second)


def _inside(ctx: BlockContext, x: Tensor, layer: DecoderLayer) -> Tensor:
    """``BloomBlock.forward``: both modules add to the residual (``dropout_add``) while their own names stand."""
    first, second = layer.norms
    block = layer.feed_forward
    assert isinstance(block, PlainMLP)

    def added(out: Tensor, residual: Tensor) -> Tensor:
        return ops.add(residual, ops.dropout(out, layer.residual_dropout, ctx.device, RESIDUAL), RESIDUAL)

    def mlp(x: Tensor) -> Tensor:
        x = activate(ctx, project(ctx, x, block.projections[0], MLP), block.activation)
        return added(project(ctx, x, block.projections[1], MLP), attended)

    normed = normalise(ctx, x, first)
    attended = _attention(ctx, normed, layer, lambda out: added(out, x))
    normed = normalise(ctx, attended, second)
    return ctx.call(layer.feed_forward_name, (), mlp, normed)


def _norm_after(ctx: BlockContext, x: Tensor, layer: DecoderLayer) -> Tensor:
    """``Olmo2DecoderLayer.forward``."""
    first, second = layer.norms
    residual = x
    x = _attention(ctx, x, layer)
    x = normalise(ctx, x, first)
    x = ops.add(residual, x, RESIDUAL)
    residual = x
    x = _mlp(ctx, x, layer)
    x = normalise(ctx, x, second)
    return ops.add(residual, x, RESIDUAL)


def _sandwich(ctx: BlockContext, x: Tensor, layer: DecoderLayer) -> Tensor:
    """``Gemma2DecoderLayer.forward``."""
    before_attention, after_attention, before_mlp, after_mlp = layer.norms
    residual = x
    x = normalise(ctx, x, before_attention)
    x = _attention(ctx, x, layer)
    x = normalise(ctx, x, after_attention)
    x = ops.add(residual, x, RESIDUAL)
    residual = x
    x = normalise(ctx, x, before_mlp)
    x = _mlp(ctx, x, layer)
    x = normalise(ctx, x, after_mlp)
    return ops.add(residual, x, RESIDUAL)


_ARRANGEMENTS: dict[str, Callable[[BlockContext, Tensor, DecoderLayer], Tensor]] = {
    "sequential": _sequential,
    "parallel": _parallel,
    "in_turn": _parallel,
    "post": _post,
    "inside": _inside,
    "norm_after": _norm_after,
    "sandwich": _sandwich,
}
