"""DeepSeek's routers: scores in fp32, and the experts of a token out of its best groups of experts."""

from __future__ import annotations

from vramplan.facts.architecture import MixtureOfExperts
from vramplan.facts.dtype import Dtype
from vramplan.memory import ops, routed
from vramplan.memory.blocks.context import BlockContext, tokens
from vramplan.memory.blocks.linear import product
from vramplan.memory.leaf import Parameter
from vramplan.memory.tape import Tensor

ROUTER = "router"


def scores_fp32(ctx: BlockContext, x: Tensor, weight: Parameter, block: MixtureOfExperts) -> Tensor:
    """``F.linear(x.type(float32), weight.type(float32))``, which autocast casts back."""
    numel = tokens(block.num_experts)
    if ctx.dtype is Dtype.FP32:
        return product(ctx, x, weight, None, numel, ROUTER)
    wide, wide_weight = ops.to(x, Dtype.FP32, ROUTER), ops.to(weight, Dtype.FP32, ROUTER)
    return ops.linear(wide, wide_weight, None, numel, ROUTER, ctx.own_linears, flat=ctx.flat)


def sigmoid_of_groups(ctx: BlockContext, scores: Tensor, block: MixtureOfExperts) -> tuple[Tensor, Tensor]:
    """``DeepseekV3TopkRouter.forward``: groups by their two best, weights without the correction that chose."""
    tape, chosen = ctx.tape, tokens(block.experts_per_token)
    scores = ops.unary(scores, ROUTER, "result")
    corrected = tape.new(scores.numel, Dtype.FP32, ROUTER)
    best = tape.new(tokens(2 * block.num_groups), Dtype.FP32, ROUTER)
    frame = [tape.new(tokens(2 * block.num_groups), Dtype.INT64, ROUTER)]  # saved, though nothing asks for it
    frame.append(tape.new(tokens(block.num_groups), Dtype.FP32, ROUTER))
    del best
    mask = _outside_best_groups(ctx, block, frame)
    frame += [mask, tape.new(scores.numel, Dtype.FP32, ROUTER)]
    del corrected
    values = tape.new(chosen, Dtype.FP32, ROUTER)
    experts = tape.new(chosen, Dtype.INT64, ROUTER)
    del values
    weights = routed.picked(scores, experts, chosen, ROUTER)
    if block.normalises:
        weights = routed.divided_by_sum(weights, tokens(1), ROUTER, shifted=True)
    weights = ops.scaled(weights, ROUTER)
    frame.clear()
    return weights, experts


def softmax_greedy(ctx: BlockContext, scores: Tensor, block: MixtureOfExperts) -> tuple[Tensor, Tensor]:
    """``DeepseekV2TopkRouter.forward`` with ``topk_method: greedy``."""
    scores = ops.softmax(scores, Dtype.FP32, ctx.device, ROUTER)
    weights, experts = routed.best(scores, tokens(block.experts_per_token), ROUTER)
    return ops.scaled(weights, ROUTER), experts


def softmax_of_groups(ctx: BlockContext, scores: Tensor, block: MixtureOfExperts) -> tuple[Tensor, Tensor]:
    """``DeepseekV2TopkRouter.forward`` with ``group_limited_greedy``: groups by their best expert."""
    tape, groups = ctx.tape, tokens(block.num_groups)
    scores = ops.softmax(scores, Dtype.FP32, ctx.device, ROUTER)
    frame = [tape.new(groups, Dtype.FP32, ROUTER), tape.new(groups, Dtype.INT64, ROUTER)]
    mask = _outside_best_groups(ctx, block, frame)
    scores = routed.filled(scores, mask, ROUTER)
    del mask
    weights, experts = routed.best(scores, tokens(block.experts_per_token), ROUTER)
    weights = ops.scaled(weights, ROUTER)
    frame.clear()
    return weights, experts


def _outside_best_groups(ctx: BlockContext, block: MixtureOfExperts, frame: list[Tensor]) -> Tensor:
    """``~score_mask.bool()``; what stays named until the router returns goes to ``frame``."""
    tape, groups, kept = ctx.tape, tokens(block.num_groups), tokens(block.groups_per_token)
    values = tape.new(kept, Dtype.FP32, ROUTER)
    frame.append(tape.new(kept, Dtype.INT64, ROUTER))
    del values
    frame += [tape.new(groups, Dtype.FP32, ROUTER), tape.new(tokens(block.num_experts), Dtype.FP32, ROUTER)]
    inside = tape.new(tokens(block.num_experts), Dtype.BOOL, ROUTER)
    outside = tape.new(tokens(block.num_experts), Dtype.BOOL, ROUTER)
    del inside
    return outside
