"""Llama-4's blocks with experts: every expert multiplies every token, scaled by the sigmoid of its score or by 0.

(transformers 5.17, models/llama4/modeling_llama4.py, ``Llama4TextMoe``, ``Llama4Router``, ``Llama4TextExperts``.)
"""

from __future__ import annotations

from vramplan.facts.architecture import MixtureOfExperts
from vramplan.facts.dtype import Dtype
from vramplan.memory import ops, routed
from vramplan.memory.blocks.balance import collect
from vramplan.memory.blocks.context import BlockContext, tokens
from vramplan.memory.blocks.experts import EXPERTS
from vramplan.memory.blocks.folded import Factors, fold, in_wrappers
from vramplan.memory.blocks.grouped_router import ROUTER
from vramplan.memory.blocks.linear import cast_of_weight, product, recomputed
from vramplan.memory.blocks.mlp import activate, gated
from vramplan.memory.leaf import Parameter
from vramplan.memory.size import Size
from vramplan.memory.tape import Tensor


def mixture_of_all(ctx: BlockContext, x: Tensor, block: MixtureOfExperts) -> Tensor:
    """``Llama4TextMoe.forward``, of x as sequences; a matrix (tokens, features) comes back."""
    hidden, count = block.experts.hidden_size, block.num_experts
    shared = block.shared
    assert shared is not None
    ctx.flat = True
    try:
        x = ops.view(x)
        scores, raw = _route(ctx, x, block)
        everyone = routed.repeated(x, tokens(count * hidden), EXPERTS)
        everyone = ops.mul_broadcast(everyone, ops.clone(scores, EXPERTS), EXPERTS)
        routed_out = _experts(ctx, everyone, block)
        name = shared.projections[0].name.rpartition(".")[0]
        out = ctx.call(name, (), lambda x: gated(ctx, x, shared, name), x)
        total = routed.summed(ops.view(routed_out), count, tokens(hidden), EXPERTS)
        out = ops.add(out, total, EXPERTS, in_place=True)
        del total, everyone, routed_out, scores, raw  # named until the function returns
        return out
    finally:  # recomputing can end in the middle
        ctx.flat = False


def _route(ctx: BlockContext, x: Tensor, block: MixtureOfExperts) -> tuple[Tensor, Tensor]:
    """``Llama4Router.forward``: factors of every (token, expert) pair, and the scores as they are."""
    router, pairs = block.router, tokens(block.num_experts)
    weight, bias = ctx.linear_parameters(next(iter(router.linears())))
    raw: list[Tensor] = []

    def run(x: Tensor) -> Tensor:
        scores = product(ctx, x, weight, bias, pairs, ROUTER)
        raw.append(scores)
        values, indices = routed.best(scores, tokens(block.experts_per_token), ROUTER)
        placed = routed.scattered_into(values, indices, pairs, ROUTER)
        low = placed.dtype
        wide = ops.unary(ops.to(placed, Dtype.FP32, ROUTER), ROUTER, "result")
        out = ops.to(wide, low, ROUTER)
        del values, indices, placed, wide
        return out

    factors = ctx.call(router.name, (weight, bias), run, x)
    collect(ctx, raw[0])
    return factors, raw[0]


def _experts(ctx: BlockContext, x: Tensor, block: MixtureOfExperts) -> Tensor:
    """``Llama4TextExperts.forward``."""
    params = {
        tensor.name.rpartition(".")[2]: ctx.parameter(tensor.name, tensor.numel) for tensor in block.experts.tensors()
    }
    name, inner = block.experts.name, tokens(block.num_experts * block.experts.intermediate)
    both, hidden = ops.resized(inner, 2), tokens(block.num_experts * block.experts.hidden_size)

    def run(x: Tensor, factors: dict[str, Factors]) -> Tensor:
        weights: dict[str, Tensor] = dict(params)
        if "gate_up_proj" in factors:
            weights["gate_up_proj"] = fold(ctx, params["gate_up_proj"], factors["gate_up_proj"])
        gate_up = _product(ctx, ops.view(x), weights["gate_up_proj"], both)
        gate, up = ops.split(gate_up, [inner, inner])
        rows = ops.mul(up, activate(ctx, gate, block.activation, name, EXPERTS), EXPERTS)
        if "down_proj" in factors:
            weights["down_proj"] = fold(ctx, params["down_proj"], factors["down_proj"])
        out = ops.view(_product(ctx, rows, weights["down_proj"], hidden))
        del gate_up, gate, up, weights  # what is folded is cached until the function returns
        return out

    return in_wrappers(ctx, x, block, params, run)


def _product(ctx: BlockContext, x: Tensor, weight: Tensor, numel: Size) -> Tensor:
    """``torch.bmm(x, weight)``, cast as autocast says."""
    if not isinstance(weight, Parameter):
        low, cast = ctx.all_low(EXPERTS, x, weight)
        return routed.batched_product(low, cast, numel, EXPERTS, None)
    cast = cast_of_weight(ctx, weight)  # before x (``BlockContext.all_low``)
    whole = recomputed(ctx, weight) if cast is weight else None  # of a cast, the cast is saved
    return routed.batched_product(ctx.low(x, EXPERTS), cast, numel, EXPERTS, whole)
