"""Adapters on parameters: the weight and the product of its factors are folded into one tensor, which the graph keeps.

PEFT does so for routers and routed experts (peft 0.21, lora/layer.py, ``ParamWrapper._activate_lora``): once when
the parametrization is hung on the module, which is thrown away, and once when the weight is used.
"""

from __future__ import annotations

from collections.abc import Callable

from vramplan.facts.architecture import MixtureOfExperts
from vramplan.memory import ops
from vramplan.memory.blocks.context import BlockContext
from vramplan.memory.leaf import Parameter
from vramplan.memory.tape import Node, Tensor
from vramplan.spec.targets import fused_adapters
from vramplan.spec.trainable import LoraMethod

LABEL = "adapters"
FOLDED = "weights with their adapters folded in"

Factors = tuple[Tensor, Tensor]


def factor_parameters(ctx: BlockContext, block: MixtureOfExperts) -> dict[str, tuple[Parameter, Parameter]]:
    """The two factors of each adapted parameter of a block, by the parameter's name within the layer."""
    if not ctx.adapted_parameters or not isinstance(ctx.method, LoraMethod):
        return {}
    return {
        each.parameter: (
            ctx.parameter(each.down, each.down_numel, True, ctx.adapter_dtype),
            ctx.parameter(each.up, each.up_numel, True, ctx.adapter_dtype),
        )
        for each in fused_adapters(block, ctx.adapted_parameters, ctx.method.r)
    }


Run = Callable[[Tensor, dict[str, Factors]], Tensor]
"""What the experts do with their input and the factors by the weight that each pair is folded into."""


def in_wrappers(
    ctx: BlockContext, x: Tensor, block: MixtureOfExperts, params: dict[str, Parameter], run: Run
) -> Tensor:
    """The experts inside the wrappers that adapt their parameters; that of ``down_proj`` is the outermost.

    A wrapper reads the weight besides its factors.
    """
    name, found = block.experts.name, factor_parameters(ctx, block)
    pairs = {suffix: found.get(f"{name}.{suffix}") for suffix in ("down_proj", "gate_up_proj")}
    wrapped = [(params[suffix], pair) for suffix, pair in pairs.items() if pair is not None]
    return _enter(
        ctx,
        x,
        name,
        wrapped,
        {},
        lambda x, factors: ctx.call(
            name + ".base_layer" * len(wrapped), tuple(params.values()), lambda x: run(x, factors), x
        ),
    )


def _enter(
    ctx: BlockContext,
    x: Tensor,
    name: str,
    wrapped: list[tuple[Parameter, tuple[Parameter, Parameter]]],
    factors: dict[str, Factors],
    run: Run,
) -> Tensor:
    if not wrapped:
        return run(x, factors)
    (weight, pair), *rest = wrapped

    def inside(x: Tensor) -> Tensor:
        ctx.reads(*pair, weight)
        hung = {weight.name.rpartition(".")[2]: hang(ctx, weight, pair)}
        return _enter(ctx, x, f"{name}.base_layer", rest, factors | hung, run)

    return ctx.call(name, (), inside, x, read=(*pair, weight))


def hang(ctx: BlockContext, weight: Parameter, factors: tuple[Parameter, Parameter]) -> Factors:
    """``register_parametrization``: the factors, an expert at a time, in the weight's format; the fold is tried once.

    Their gradients pass these views, nodes made before the fold and whatever uses it, so they come when all that is
    done."""
    low = tuple(ops.to(_view(ctx, factor), weight.dtype, LABEL) for factor in factors)
    tried = ctx.tape.new(weight.numel, weight.dtype, ops.TEMPORARY)
    del tried
    return low[0], low[1]


def _view(ctx: BlockContext, factor: Parameter) -> Tensor:
    """A factor an expert at a time: of a gathered one a view of the whole, which outlives its release where saved."""
    view = ops.view(factor)
    whole = ctx.hooks.whole(factor.name) if ctx.hooks is not None else None
    return view if whole is None else Tensor(whole.storage, view.numel, view.dtype, view.node, view.slot)


def fold(ctx: BlockContext, weight: Parameter, factors: Factors) -> Tensor:
    """``baddbmm(weight, lhs, rhs, alpha=scaling)``: saves the factors."""
    tape = ctx.tape
    dtype, numels = weight.dtype, [factor.numel for factor in factors]

    def backward(node: Node, grads: list[Tensor | None]) -> list[Tensor | None]:
        held = [node.unpack(0), node.unpack(1)]
        results: list[Tensor | None] = [tape.new(numel, dtype, ops.GRADIENTS) for numel in numels]
        del held
        return results

    node = tape.record("baddbmm", list(factors), list(factors), backward)
    out = tape.new(weight.numel, dtype, FOLDED)
    out.node = node
    return out
