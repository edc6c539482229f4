"""DoRA's part of an adapted projection: the weights' column norms, the magnitude vector, the adapter's own product.

Paper: Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation" (arXiv 2402.09353). Code:
peft/tuners/lora/dora.py, ``DoraLinearLayer.forward``, and peft/tuners/lora/variants.py, ``DoraLinearVariant.forward``.
"""

from __future__ import annotations

from collections.abc import Callable

from vramplan.facts.architecture import Embedding, Linear
from vramplan.facts.dtype import Dtype
from vramplan.memory import ops
from vramplan.memory.blocks.context import BlockContext, tokens
from vramplan.memory.leaf import Parameter
from vramplan.memory.quantized import BLOCK
from vramplan.memory.size import Size
from vramplan.memory.tape import Tensor
from vramplan.spec.trainable import LoraMethod

Product = Callable[[Tensor, int], Tensor]
"""``lora_B(lora_A(x))`` of an x with so many rows; 0 rows: the tokens of the micro-batch."""
LABEL = "adapters"


def dora(
    ctx: BlockContext, x: Tensor, linear: Linear, magnitude: Parameter, product: Product, base: Tensor | None
) -> Tensor:
    """What is added to the base layer's result. ``base``: that result, or None where dropout changed x."""
    weight, bias = ctx.linear_parameters(linear)
    delta = ops.to(_delta(ctx, x, linear, product), x.dtype, LABEL)
    ctx.reads(weight)
    cast = ops.to(_weight(ctx, linear), x.dtype, LABEL)
    norm = _norm(ctx, cast, delta.detach(), linear)
    scale = _quotient(magnitude, norm)
    low_rank = product(x, 0)
    if base is None:
        low = ctx.autocast or x.dtype
        narrow, out = ops.to(cast, low, LABEL), tokens(linear.out_features)
        base = ops.linear(ops.to(x, low, LABEL), narrow, None, out, LABEL, ctx.hooks is not None)
        del narrow
    elif bias is not None:  # the difference takes the bias's format where that is wider
        ctx.reads(bias)
        base = ops.shifted(base, LABEL) if base.dtype is bias.dtype else ops.to(base, bias.dtype, LABEL)
    # every name of ``forward`` keeps its tensor until it returns
    directed = ops.mul_broadcast(base, ops.shifted(scale, LABEL), LABEL, small_first=True)
    scaled = ops.scaled(ops.mul_broadcast(low_rank, scale, LABEL, small_first=True), LABEL)
    return ops.add(directed, scaled, LABEL)


def dora_of_table(
    ctx: BlockContext,
    ids: Tensor,
    table: Embedding,
    weight: Parameter,
    factors: tuple[Parameter, Parameter],
    magnitude: Parameter,
    method: LoraMethod,
) -> tuple[Tensor, Tensor]:
    """``DoraEmbeddingLayer.forward``: the magnitudes by their norms, and the adapter's part of the result.

    The adapter as a whole table, and what its product saved, stay until it returns.
    """
    tape, (down, up) = ctx.tape, factors
    low = ctx.autocast or down.dtype
    saved = [tape.new(each.numel, low, LABEL) for each in factors if each.dtype is not low]
    delta = tape.new(weight.numel, low, LABEL)
    ctx.reads(weight)
    scaled = tape.new(delta.numel, low, LABEL)
    total = ops.add(weight.detach(), scaled, LABEL)
    del scaled
    norm = tape.new((table.width, 0, 0, 0, 0), total.dtype, LABEL)
    del total
    scale = _quotient(magnitude, norm)
    # the dense gradient of the narrow table lies the other way round than the factor, so it is copied
    narrow = ops.embedding(tape, ops.to_heads(down), tokens(method.r), down.dtype, LABEL)
    narrow, wide = ctx.all_low(LABEL, narrow, ops.view(up))
    product = ops.linear(narrow, wide, None, tokens(table.width), LABEL)
    del narrow, wide
    added = ops.scaled(ops.mul_broadcast(product, scale, LABEL, small_first=True), LABEL)
    del saved, delta
    return scale, added


def _weight(ctx: BlockContext, linear: Linear) -> Tensor:
    """The base layer's weight; one in 4 bits is written out in the format that it was stored from, its scales in fp32
    beside it (peft/utils/integrations.py, ``dequantize_module_weight``; bitsandbytes/functional.py,
    ``dequantize_4bit``)."""
    if not ctx.quantizes(linear):
        return ctx.linear_parameters(linear)[0]
    scales = ctx.tape.new((linear.weight_numel // BLOCK, 0, 0, 0, 0), Dtype.FP32, LABEL)
    written = ctx.tape.new((linear.weight_numel, 0, 0, 0, 0), ctx.dtype, LABEL)
    del scales
    return written


def _delta(ctx: BlockContext, x: Tensor, linear: Linear, product: Product) -> Tensor:
    """``lora_B(lora_A(eye)).T``: the adapter as a matrix, made by running it on the identity."""
    width = linear.in_features
    eye = ctx.tape.new((width * width, 0, 0, 0, 0), ctx.adapter_dtype or ctx.dtype, LABEL)
    return product(eye, width)


def _norm(ctx: BlockContext, weight: Tensor, delta: Tensor, linear: Linear) -> Tensor:
    """``linalg.norm(weight + scaling * delta, dim=1)``; outside the graph."""
    scaled = ctx.tape.new(delta.numel, delta.dtype, LABEL)
    total = ctx.tape.new(weight.numel, weight.dtype, LABEL)
    del scaled
    norm = ctx.tape.new((linear.out_features, 0, 0, 0, 0), weight.dtype, LABEL)
    del total
    return norm


def _quotient(magnitude: Parameter, norm: Tensor) -> Tensor:
    """``magnitude / norm``: saves the norm (``div``: self)."""
    tape, numel, dtype = norm.storage.tape, magnitude.numel, magnitude.dtype
    out = tape.new(numel, norm.dtype, LABEL)

    return tape.attach("div", out, [magnitude], [norm], ops.one_gradient(numel, dtype, ops.WEIGHT_GRADIENT))


def rows(count: int, width: int) -> Size:
    """Elements of ``count`` rows of ``width`` features; 0 stands for the tokens of the micro-batch."""
    return (count * width, 0, 0, 0, 0) if count else tokens(width)
