"""A projection as the model calls it: ``nn.Linear`` or ``Conv1D``, under autocast, with or without an adapter."""

from __future__ import annotations

from dataclasses import replace

from vramplan.facts.architecture import Linear
from vramplan.memory import labels, ops
from vramplan.memory.blocks.context import BlockContext, identity, tokens
from vramplan.memory.blocks.dora import dora, rows
from vramplan.memory.cast_linear import linear_cast_zero3
from vramplan.memory.leaf import Parameter
from vramplan.memory.size import Size
from vramplan.memory.tape import Tensor
from vramplan.spec.trainable import LoraMethod

LABEL = "adapters"


def project(ctx: BlockContext, x: Tensor, linear: Linear, label: str) -> Tensor:
    """``linear(x)``, plus PEFT's adapter where the method puts one on it."""
    adapter = ctx.adapts(linear)
    if adapter is None:
        return _dense(ctx, x, linear, label)
    down = _down(ctx, linear, adapter)  # the wrapper reads its dtype (``_with_adapter``)
    return ctx.call(linear.name, (), lambda x: _with_adapter(ctx, x, linear, adapter, label), x, read=(down,))


def linear_parameters(ctx: BlockContext, linear: Linear) -> list[Parameter]:
    """Every parameter of a projection, its adapter's too, in registration order."""
    adapter = ctx.adapts(linear)
    base = linear if adapter is None else replace(linear, name=f"{linear.name}.base_layer")
    params = [param for param in ctx.linear_parameters(base) if param is not None]
    return params if adapter is None else [*params, _down(ctx, linear, adapter), _up(ctx, linear, adapter)]


def _down(ctx: BlockContext, linear: Linear, method: LoraMethod) -> Parameter:
    return ctx.parameter(f"{linear.name}.lora_A.weight", method.r * linear.in_features, True, ctx.adapter_dtype)


def _up(ctx: BlockContext, linear: Linear, method: LoraMethod) -> Parameter:
    return ctx.parameter(f"{linear.name}.lora_B.weight", method.r * linear.out_features, True, ctx.adapter_dtype)


def _dense(ctx: BlockContext, x: Tensor, linear: Linear, label: str) -> Tensor:
    if ctx.quantizes(linear):
        return _quantized(ctx, x, linear, label)
    weight, bias = ctx.linear_parameters(linear)
    if linear.by_matmul:
        return ctx.call(linear.name, (weight, bias), lambda x: _matmul(ctx, x, weight, bias, linear, label), x)
    if linear.conv1d:
        return ctx.call(linear.name, (weight, bias), lambda x: _conv1d(ctx, x, weight, bias, linear, label), x)
    return ctx.call(
        linear.name, (weight, bias), lambda x: product(ctx, x, weight, bias, tokens(linear.out_features), label), x
    )


def _quantized(ctx: BlockContext, x: Tensor, linear: Linear, label: str) -> Tensor:
    """``Linear4bit.forward``: the input in the compute format, and the result back in the input's."""
    weight, bias = ctx.linear_parameters(linear)

    def run(x: Tensor) -> Tensor:
        given, low, out_numel = x.dtype, ops.to(x, ctx.autocast or ctx.dtype, label), tokens(linear.out_features)
        out = ops.linear_4bit(low, linear.weight_numel, out_numel, label, ctx.dtype, ctx.device)
        if ctx.hooks is not None:
            _view_in_node(ctx, out, weight.name, ctx.hooks.whole(weight.name))
        result = ops.to(out, given, label)
        del low  # named until the module returns
        return result

    return ctx.call(linear.name, (weight, bias), run, x)


def _view_in_node(ctx: BlockContext, out: Tensor, name: str, whole: Tensor | None) -> None:
    """``MatMul4Bit``'s node itself keeps a view of the gathered weight (``ctx.tensors``, not torch's
    ``saved_tensors``): no checkpoint knows of it, and it lives as long as the graph, which goes with its backward where
    it is a recomputation's."""
    if out.node is not None and whole is not None:
        held = ctx.graph if ctx.tape.in_first_forward else out.node.saved
        held.append(Tensor(whole.storage, whole.numel, whole.dtype))
        ctx.viewed.add(name)


def product(ctx: BlockContext, x: Tensor, weight: Parameter, bias: Parameter | None, out: Size, label: str) -> Tensor:
    """``F.linear(x, weight, bias)``, cast as autocast says."""
    if ctx.autocast is None:
        # torch's own linear saves a transposed view of the weight, which outlives the release of a gathered one
        own = ctx.own_linears or ctx.hooks is None
        whole = recomputed(ctx, weight) if own or ctx.hooks is None else ctx.hooks.whole(weight.name)
        return ops.linear(x, weight, bias, out, label, ctx.own_linears, whole, ctx.flat)
    if ctx.own_linears:
        return linear_cast_zero3(x, weight, bias, out, ctx.autocast, label, whole=recomputed(ctx, weight))
    # the last argument is cast first (``BlockContext.all_low``)
    cast_bias = cast_of_weight(ctx, bias) if bias is not None else None
    cast_weight = cast_of_weight(ctx, weight)
    return ops.linear(ctx.low(x, label), cast_weight, cast_bias, out, label, flat=ctx.flat)


def _matmul(
    ctx: BlockContext, x: Tensor, weight: Parameter, bias: Parameter | None, linear: Linear, label: str
) -> Tensor:
    """``FalconLinear.forward``: ``x @ weight.T``, then the bias. What is saved of a gathered weight is its transposed
    view, which outlives the release; under autocast a view of its cast."""
    if linear.shares_input:  # ``ColumnParallel``: backward comes to it when the weight's gradient is there
        x = identity(x, lambda: None)
    # of a view autocast caches no copy (``cached_cast``)
    cast = weight if ctx.autocast is None else ops.to(weight, ctx.autocast, labels.AUTOCAST_COPIES)
    low = ctx.low(x, label)
    whole = ctx.hooks.whole(weight.name) if ctx.hooks is not None and cast is weight else None
    out = ops.linear(low, cast, None, tokens(linear.out_features), label, whole=whole)
    del low, cast, whole  # autocast's copies go when the product is there
    return out if bias is None else ops.add_vector(out, bias, label)


def _conv1d(
    ctx: BlockContext, x: Tensor, weight: Parameter, bias: Parameter | None, linear: Linear, label: str
) -> Tensor:
    """``Conv1D.forward``: ``torch.addmm``, which DeepSpeed does not replace under ZeRO-3 as it does ``F.linear``."""
    cast = cast_of_weight(ctx, weight)  # ``addmm(bias, x, weight)``: the last argument is cast first
    low = ctx.low(x, label)
    cast_bias = cast_of_weight(ctx, bias) if bias is not None else None
    whole = recomputed(ctx, weight) if cast is weight else None
    return ops.linear(low, cast, cast_bias, tokens(linear.out_features), label, whole=whole)


def recomputed(ctx: BlockContext, weight: Parameter) -> Tensor | None:
    """What recomputing saves of a gathered weight: a view of the whole, which outlives its release, if it is trained
    (torch/utils/checkpoint.py stores ``x.detach() if x.requires_grad else x``); elsewhere the parameter itself is
    saved, and loses its bytes when it is released."""
    if ctx.hooks is None or not ctx.tape.records or not weight.requires_grad:
        return None
    return ctx.hooks.whole(weight.name)


def cast_of_weight(ctx: BlockContext, weight: Parameter) -> Tensor:
    """A weight as autocast hands it to a product: itself where autocast is off, else a copy, made once while autocast
    is on and kept if the weight is trained (``at::autocast::cached_cast``), or made for each use."""
    if ctx.autocast is None:
        return weight
    if weight.name in ctx.casts:
        return ctx.casts[weight.name]
    copy = ops.to(weight, ctx.autocast, labels.AUTOCAST_COPIES)
    if weight.requires_grad:
        ctx.casts[weight.name] = copy
    return copy


def _with_adapter(ctx: BlockContext, x: Tensor, linear: Linear, method: LoraMethod, label: str) -> Tensor:
    """``result + lora_B(lora_A(dropout(x))) * scaling`` (peft/tuners/lora/layer.py, ``Linear.forward``)."""
    base = replace(linear, name=f"{linear.name}.base_layer")
    result = _dense(ctx, x, base, label)
    if ctx.quantizes(linear):  # peft/tuners/lora/bnb.py, Linear4bit.forward, clones it
        result = ops.clone(result, label)
    narrow_format = result.dtype
    # lora/bnb.py leaves it to autocast, but asks of CUDA's alone whether it is on
    converts = not (ctx.quantizes(linear) and ctx.autocast is not None and ctx.device == "cuda")
    if converts:
        ctx.reads(_down(ctx, linear, method))
        x = ops.to(x, ctx.adapter_dtype or ctx.dtype, LABEL)  # _cast_input_dtype
    if method.use_dora:
        dropped = _dropped(ctx, x, linear, method)
        given = result if method.dropout == 0 or not ctx.tape.training else None
        name = f"{linear.name}.lora_magnitude_vector.weight"
        magnitude = ctx.parameter(name, linear.out_features, True, ctx.adapter_dtype)
        added = ctx.call(
            f"{linear.name}.lora_magnitude_vector",
            (magnitude,),
            lambda x: dora(ctx, x, base, magnitude, lambda x, count: _low_rank(ctx, x, linear, method, count), given),
            dropped,
            read=_read_by_dora(ctx, base, given is not None),
        )
        del given, dropped
    else:  # one expression: what is dropped goes as soon as lora_A returns, unless that saved it
        added = ops.scaled(_low_rank(ctx, _dropped(ctx, x, linear, method), linear, method), LABEL)
        if ctx.quantizes(linear) and converts:  # lora/bnb.py: before the sum, where lora/layer.py converts the sum
            added = ops.to(added, narrow_format, LABEL)
    result = ops.add(result, added, label)
    del added
    return ops.to(result, narrow_format, label)


def _read_by_dora(ctx: BlockContext, base: Linear, with_bias: bool) -> tuple[Parameter, ...]:
    """What DoRA's module reads of the base layer."""
    weight, bias = ctx.linear_parameters(base)
    return (weight, bias) if with_bias and bias is not None else (weight,)


def _dropped(ctx: BlockContext, x: Tensor, linear: Linear, method: LoraMethod) -> Tensor:
    return ctx.call(
        f"{linear.name}.lora_dropout",
        (),
        lambda x: ops.dropout(x, method.dropout, ctx.device, "adapters: dropped input"),
        x,
    )


def _low_rank(ctx: BlockContext, x: Tensor, linear: Linear, method: LoraMethod, count: int = 0) -> Tensor:
    """``lora_B(lora_A(x))`` of so many rows; 0: of the micro-batch's tokens."""
    narrow = _narrow(ctx, x, linear, method, count)
    del x  # an argument of lora_A's alone
    return _wide(ctx, narrow, linear, method, count)


def _narrow(ctx: BlockContext, x: Tensor, linear: Linear, method: LoraMethod, count: int = 0) -> Tensor:
    down = _down(ctx, linear, method)
    out = rows(count, method.r)
    return ctx.call(f"{linear.name}.lora_A", (down,), lambda x: product(ctx, x, down, None, out, LABEL), x)


def _wide(ctx: BlockContext, narrow: Tensor, linear: Linear, method: LoraMethod, count: int = 0) -> Tensor:
    up = _up(ctx, linear, method)
    out = rows(count, linear.out_features)
    return ctx.call(f"{linear.name}.lora_B", (up,), lambda x: product(ctx, x, up, None, out, LABEL), narrow)
