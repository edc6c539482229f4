"""Adapters on parameters: the weight and the product of its factors are folded into one tensor, which the graph keeps.

PEFT does so for routers and routed experts (peft 0.21, lora/layer.py, ``ParamWrapper._activate_lora``): once when
the parametrization is hung on the module, which is thrown away, and once when the weight is used.
"""

from __future__ import annotations

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


def hang(ctx: BlockContext, weight: Parameter, factors: tuple[Parameter, Parameter]) -> Factors:
    """``register_parametrization``: the factors in the weight's format; the fold is tried once."""
    low = ops.to(factors[0], weight.dtype, LABEL), ops.to(factors[1], weight.dtype, LABEL)
    tried = ctx.tape.new(weight.numel, weight.dtype, ops.TEMPORARY)
    del tried
    return low


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
