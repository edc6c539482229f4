"""Normalisation: HF's Python RMSNorm, op by op, and ``nn.LayerNorm``."""

from __future__ import annotations

from vramplan.facts.architecture import Norm
from vramplan.facts.dtype import Dtype
from vramplan.memory import ops
from vramplan.memory.blocks.context import BlockContext, tokens
from vramplan.memory.size import Size
from vramplan.memory.tape import Tensor


def normalise(ctx: BlockContext, x: Tensor, norm: Norm, label: str = "norms", rows: Size | None = None) -> Tensor:
    """``norm(x)`` over the last axis; ``rows``: how many rows that is (default: one a token)."""
    rows = rows if rows is not None else tokens(1)
    weight, bias = ctx.norm_parameters(norm)

    def run(x: Tensor) -> Tensor:
        if norm.kind == "layer":
            statistics = Dtype.FP32 if ctx.device == "cuda" else x.dtype
            return ops.layer_norm(x, weight, bias, rows, statistics, label)
        return _rms(ctx, x, norm, rows, label)

    return ctx.call(norm.name, (weight, bias), run, x)


def _rms(ctx: BlockContext, x: Tensor, norm: Norm, rows: Size, label: str) -> Tensor:
    """``weight * (x32 * rsqrt(mean(x32 ** 2) + eps)).to(dtype)`` (``LlamaRMSNorm.forward``)."""
    source = x.dtype
    weight, _ = ctx.norm_parameters(norm)
    x = ops.to(x, Dtype.FP32, label)
    squared = ops.square(x, "temporary of an operator")
    variance = ops.row_mean(squared, rows, label)
    del squared
    variance = ops.shifted(variance, label)
    scale = ops.unary(variance, label, "result")
    del variance
    x = ops.mul_broadcast(x, scale, label)
    del scale
    low = ops.to(x, source, label)
    if weight is None:
        return low
    return ops.mul_broadcast(low, weight, label, small_first=True)
