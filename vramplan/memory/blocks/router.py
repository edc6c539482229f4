"""The router of routed experts: scores of all experts for every token, and the weights of the best."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vramplan.facts.architecture import MixtureOfExperts
from vramplan.facts.dtype import Dtype
from vramplan.memory import ops, routed
from vramplan.memory.blocks.balance import collect
from vramplan.memory.blocks.context import BlockContext, tokens
from vramplan.memory.blocks.folded import Factors, factor_parameters, fold, hang
from vramplan.memory.blocks.grouped_router import (
    ROUTER,
    scores_fp32,
    sigmoid_of_groups,
    softmax_greedy,
    softmax_of_groups,
)
from vramplan.memory.blocks.linear import product
from vramplan.memory.cast_linear import linear_cast_zero3
from vramplan.memory.leaf import Parameter
from vramplan.memory.tape import Tensor


@dataclass(slots=True)
class Routing:
    """What a router returns: scores of all experts, and weights and numbers of each token's own."""

    scores: Tensor
    weights: Tensor
    experts: Tensor


def route(ctx: BlockContext, x: Tensor, block: MixtureOfExperts) -> Routing:
    """``gate(x)`` of x as a matrix (tokens, features)."""
    router = block.router
    weight = ctx.parameter(f"{router.name}.weight", router.num_experts * router.in_features)
    bias = ctx.parameter(f"{router.name}.bias", router.num_experts) if router.bias else None
    found: list[Routing] = []

    pair = factor_parameters(ctx, block).get(weight.name.removeprefix(ctx.prefix))

    def run(x: Tensor, factors: Factors | None = None) -> Tensor:
        x = x if block.scoring == "best" else ops.view(x)  # hidden_states.reshape(-1, hidden_dim), not in GPT-OSS
        if factors is not None:
            scores = _with_adapter(ctx, x, weight, bias, factors, block)
        elif block.scores_in_fp32:
            scores = scores_fp32(ctx, x, weight, block)
        else:
            scores = product(ctx, x, weight, bias, tokens(router.num_experts), ROUTER)
        found.append(Routing(scores, *_SCORINGS[block.scoring](ctx, scores, block)))
        return found[0].weights

    def in_wrapper(x: Tensor) -> Tensor:
        assert pair is not None
        ctx.reads(*pair, weight)
        factors = hang(ctx, weight, pair)
        return ctx.call(f"{router.name}.base_layer", (weight, bias), lambda x: run(x, factors), x)

    if pair is None:
        found[0].weights = ctx.call(router.name, (weight, bias), run, x)
    else:  # as ``folded.in_wrappers``
        found[0].weights = ctx.call(router.name, (), in_wrapper, x, read=(*pair, weight))
    collect(ctx, found[0].scores)
    return found[0]


def _with_adapter(
    ctx: BlockContext,
    x: Tensor,
    weight: Parameter,
    bias: Parameter | None,
    factors: Factors,
    block: MixtureOfExperts,
) -> Tensor:
    """``F.linear(x, weight + scaling * lora_B @ lora_A)``, both in fp32 first where the router says so."""
    folded = fold(ctx, weight, factors)
    if block.scores_in_fp32:
        x, folded = ops.to(x, Dtype.FP32, ROUTER), ops.to(folded, Dtype.FP32, ROUTER)
    if ctx.own_linears and ctx.autocast is not None:
        return linear_cast_zero3(x, folded, bias, tokens(block.num_experts), ctx.autocast, ROUTER)
    low, folded = ctx.all_low(ROUTER, x, folded)
    return ops.linear(low, folded, bias, tokens(block.num_experts), ROUTER, ctx.own_linears, flat=ctx.flat)


def _softmax_fp32(ctx: BlockContext, scores: Tensor, block: MixtureOfExperts) -> tuple[Tensor, Tensor]:
    """``MixtralTopKRouter.forward``."""
    # Mixtral's ``router_logits.float()`` copies before softmax is asked to
    device = ctx.device if block.scoring == "softmax" else "cpu"
    probabilities = ops.softmax(scores, Dtype.FP32, device, ROUTER)
    weights, experts = routed.best(probabilities, tokens(block.experts_per_token), ROUTER)
    if block.normalises:
        weights = routed.divided_by_sum(weights, tokens(1), ROUTER)
    return weights, experts


def _softmax(ctx: BlockContext, scores: Tensor, block: MixtureOfExperts) -> tuple[Tensor, Tensor]:
    """``Qwen3MoeTopKRouter.forward``."""
    weights, experts = _softmax_fp32(ctx, scores, block)
    return ops.to(weights, scores.dtype, ROUTER), experts


def _best(ctx: BlockContext, scores: Tensor, block: MixtureOfExperts) -> tuple[Tensor, Tensor]:
    """``GptOssTopKRouter.forward``."""
    best, experts = routed.best(scores, tokens(block.experts_per_token), ROUTER)
    return ops.softmax(best, best.dtype, ctx.device, ROUTER), experts


_SCORINGS: dict[str, Callable[[BlockContext, Tensor, MixtureOfExperts], tuple[Tensor, Tensor]]] = {
    "softmax": _softmax,
    "softmax_fp32": _softmax_fp32,
    "best": _best,
    "sigmoid_of_groups": sigmoid_of_groups,
    "softmax_greedy": softmax_greedy,
    "softmax_of_groups": softmax_of_groups,
}
