"""DoRA's part of an adapted projection: the weights' column norms, the magnitude vector, the adapter's own product.

Paper: Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation" (arXiv 2402.09353). Code:
peft/tuners/lora/dora.py, ``DoraLinearLayer.forward``, and peft/tuners/lora/variants.py, ``DoraLinearVariant.forward``.
"""

from __future__ import annotations

from collections.abc import Callable

from vramplan.facts.architecture import Linear
from vramplan.memory import ops
from vramplan.memory.blocks.context import BlockContext, tokens
from vramplan.memory.leaf import Parameter
from vramplan.memory.size import Size
from vramplan.memory.tape import Tensor

Product = Callable[[Tensor, int], Tensor]
"""``lora_B(lora_A(x))`` of an x with so many rows; 0 rows: the tokens of the micro-batch."""
LABEL = "adapters"


def dora(
    ctx: BlockContext, x: Tensor, linear: Linear, magnitude: Parameter, product: Product, base: Tensor | None
) -> Tensor:
    """What is added to the base layer's result. ``base``: that result, or None where dropout changed x."""
    weight, bias = ctx.linear_parameters(linear)
    delta = ops.to(_delta(ctx, x, linear, product), x.dtype, LABEL)
    cast = ops.to(weight, x.dtype, LABEL)
    norm = _norm(ctx, cast, delta.detach(), linear)
    scale = _quotient(magnitude, norm)
    low_rank = product(x, 0)
    if base is None:
        low = ctx.autocast or x.dtype
        narrow, out = ops.to(cast, low, LABEL), tokens(linear.out_features)
        base = ops.linear(ops.to(x, low, LABEL), narrow, None, out, LABEL, ctx.hooks is not None)
        del narrow
    elif bias is not None:  # the difference takes the bias's format where that is wider
        base = ops.shifted(base, LABEL) if base.dtype is bias.dtype else ops.to(base, bias.dtype, LABEL)
    # every name of ``forward`` keeps its tensor until it returns
    directed = ops.mul_broadcast(base, ops.shifted(scale, LABEL), LABEL, small_first=True)
    scaled = ops.scaled(ops.mul_broadcast(low_rank, scale, LABEL, small_first=True), LABEL)
    return ops.add(directed, scaled, LABEL)


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
