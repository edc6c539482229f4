"""Normalisation: HF's Python norms, op by op, and ``nn.LayerNorm``."""

from __future__ import annotations

from collections.abc import Callable

from vramplan.facts.architecture import Norm
from vramplan.facts.dtype import Dtype
from vramplan.memory import ops
from vramplan.memory.blocks.context import BlockContext, tokens
from vramplan.memory.blocks.liger import liger_rms
from vramplan.memory.leaf import Parameter
from vramplan.memory.size import Size
from vramplan.memory.tape import TEMPORARY, Tensor


def normalise(ctx: BlockContext, x: Tensor, norm: Norm, label: str = "norms", rows: Size | None = None) -> Tensor:
    """``norm(x)`` over the last axis; ``rows``: how many rows that is (default: one a token)."""
    rows = rows if rows is not None else tokens(1)
    if norm.separate_heads:
        return _each_head(ctx, x, norm, label)
    weight, bias = ctx.norm_parameters(norm)
    run = _liger if ctx.liger_kernels else _KINDS[norm.kind]
    return ctx.call(norm.name, (weight, bias), lambda x: run(ctx, x, (weight, bias), rows, label), x)


Parameters = tuple[Parameter | None, Parameter | None]


def _layer(ctx: BlockContext, x: Tensor, params: Parameters, rows: Size, label: str) -> Tensor:
    """``nn.LayerNorm``, which CUDA's autocast takes in fp32 (aten/src/ATen/autocast_mode.h,
    ``AT_FORALL_FP32``)."""
    if ctx.autocast is not None and ctx.device == "cuda":
        x = ops.to(x, Dtype.FP32, label)
    statistics = Dtype.FP32 if ctx.device == "cuda" else x.dtype
    return ops.layer_norm(x, *params, rows, statistics, label)


def _layer_fp32(ctx: BlockContext, x: Tensor, params: Parameters, rows: Size, label: str) -> Tensor:
    """``OlmoLayerNorm.forward``."""
    return ops.to(_layer(ctx, ops.to(x, Dtype.FP32, label), params, rows, label), x.dtype, label)


def _liger(ctx: BlockContext, x: Tensor, params: Parameters, rows: Size, label: str) -> Tensor:
    assert params[0] is not None
    return liger_rms(x, params[0], rows, label)


def _scaled_rows(x: Tensor, rows: Size, label: str) -> Tensor:
    """``x32 * rsqrt(mean(x32 ** 2) + eps)``."""
    squared = ops.square(x, TEMPORARY)
    variance = ops.row_mean(squared, rows, label)
    del squared
    variance = ops.shifted(variance, label)
    scale = ops.unary(variance, label, "result")
    del variance
    return ops.mul_broadcast(x, scale, label)


def _rms(ctx: BlockContext, x: Tensor, params: Parameters, rows: Size, label: str) -> Tensor:
    """``weight * (x32 * rsqrt(mean(x32 ** 2) + eps)).to(dtype)`` (``LlamaRMSNorm.forward``)."""
    source, weight = x.dtype, params[0]
    x = _scaled_rows(ops.to(x, Dtype.FP32, label), rows, label)
    low = ops.to(x, source, label)
    if weight is None:
        return low
    return ops.mul_broadcast(low, weight, label, small_first=True)


def _rms_last(ctx: BlockContext, x: Tensor, params: Parameters, rows: Size, label: str) -> Tensor:
    """``(x32 * rsqrt(mean(x32 ** 2) + eps)).type_as(x) * weight`` (``Llama4TextRMSNorm.forward``)."""
    weight = params[0]
    assert weight is not None
    output = ops.to(_scaled_rows(ops.to(x, Dtype.FP32, label), rows, label), x.dtype, label)
    return ops.mul_broadcast(output, weight, label)


def _rms_fp32(ctx: BlockContext, x: Tensor, params: Parameters, rows: Size, label: str) -> Tensor:
    """``(weight * x32 * rsqrt(mean(x32 ** 2) + eps)).to(dtype)`` (``Olmo2RMSNorm.forward``)."""
    source, weight = x.dtype, params[0]
    assert weight is not None
    x = _scaled_rows(ops.to(x, Dtype.FP32, label), rows, label)
    return ops.to(ops.mul_broadcast(x, weight, label, small_first=True), source, label)


def _rms_gemma(ctx: BlockContext, x: Tensor, params: Parameters, rows: Size, label: str) -> Tensor:
    """``(x32 * rsqrt(mean(x32 ** 2) + eps) * (1 + weight32)).to(dtype)`` (``GemmaRMSNorm.forward``)."""
    weight = params[0]
    assert weight is not None
    output = _scaled_rows(ops.to(x, Dtype.FP32, label), rows, label)
    output = ops.mul_broadcast(output, ops.shifted(ops.to(weight, Dtype.FP32, label), label), label)
    return ops.to(output, x.dtype, label)


def _layer_python(ctx: BlockContext, x: Tensor, params: Parameters, rows: Size, label: str) -> Tensor:
    """``CohereLayerNorm.forward``: mean and variance in operators of their own."""
    source, weight = x.dtype, params[0]
    assert weight is not None
    x = ops.to(x, Dtype.FP32, label)
    mean = ops.row_mean(x, rows, label)
    squared = ops.square(ops.sub_broadcast(x, mean, label), TEMPORARY)
    variance = ops.row_mean(squared, rows, label)
    del squared
    scale = ops.sub_broadcast(x, mean, label), ops.unary(ops.shifted(variance, label), label, "result")
    x = ops.mul_broadcast(*scale, label)
    del scale
    x = ops.mul_broadcast(x, ops.to(weight, Dtype.FP32, label), label, small_first=True)
    return ops.to(x, source, label)


_KINDS: dict[str, Callable[[BlockContext, Tensor, Parameters, Size, str], Tensor]] = {
    "layer": _layer,
    "layer_fp32": _layer_fp32,
    "layer_python": _layer_python,
    "rms": _rms,
    "rms_fp32": _rms_fp32,
    "rms_gemma": _rms_gemma,
    "rms_last": _rms_last,
    "l2": _rms,
}


def _each_head(ctx: BlockContext, x: Tensor, norm: Norm, label: str) -> Tensor:
    """``StableLmLayerNormPerHead.forward``: a module for each head, the results joined."""
    heads = norm.num_heads or 1

    def run(x: Tensor) -> Tensor:
        outs = []
        for index, part in enumerate(ops.split(x, [tokens(norm.width)] * heads)):
            weight = ctx.parameter(f"{norm.name}.norms.{index}.weight", norm.width)
            outs.append(ctx.call(f"{norm.name}.norms.{index}", (weight,), _one_head(ctx, weight, label), part))
        return ops.cat(outs, x.numel, label)

    return ctx.call(norm.name, (), run, x)


def _one_head(ctx: BlockContext, weight: Parameter, label: str) -> Callable[[Tensor], Tensor]:
    return lambda part: _layer(ctx, part, (weight, None), tokens(1), label)
