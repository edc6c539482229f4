"""The scores of routers that a model collects, and the loss that balances their experts.

(transformers 5.17, utils/output_capturing.py; models/mixtral/modeling_mixtral.py, ``load_balancing_loss_func``.)
"""

from __future__ import annotations

from collections.abc import Iterable

from vramplan.facts.architecture import Architecture, DecoderLayer, MixtureOfExperts
from vramplan.facts.dtype import Dtype
from vramplan.memory import ops, routed
from vramplan.memory.blocks.context import BlockContext, tokens
from vramplan.memory.size import Size, const, scale
from vramplan.memory.tape import Node, Tensor

SCORES = "scores of routers"
BALANCE = "loss"


def collect(ctx: BlockContext, scores: Tensor) -> None:
    """The hook on a router: keeps its scores until the model's output goes."""
    if ctx.router_scores is not None and ctx.tape.in_first_forward:
        ctx.tape.relabel(scores.storage, SCORES)
        ctx.router_scores.append(scores)


def collect_of_skipped(ctx: BlockContext, layers: Iterable[DecoderLayer]) -> None:
    """The scores of layers that are not run, in one tensor whose gradient waits until backward is there."""
    count = sum(isinstance(layer.feed_forward, MixtureOfExperts) for layer in layers)
    if not ctx.router_scores or not count:
        return
    like = ctx.router_scores[-1]
    scores = ctx.tape.new(scale(like.numel, count), like.dtype, SCORES)
    if like.requires_grad:
        ctx.tape.leaf(scores)
    ctx.router_scores.append(scores)


def with_balance(ctx: BlockContext, result: Tensor, architecture: Architecture, kept: list[Tensor]) -> Tensor:
    """The loss with that of the routers, whose scores the model's output holds; ``kept``: what the loop holds of it."""
    scores = ctx.router_scores
    if scores is None:
        return result
    if architecture.router_scores == "balanced" and scores:
        result = _balanced(ctx, result, architecture.mixtures[0], scores)
        kept.extend(scores)
    scores.clear()
    return result


def _balanced(ctx: BlockContext, result: Tensor, block: MixtureOfExperts, collected: list[Tensor]) -> Tensor:
    """``loss += coefficient * load_balancing_loss_func(...)``: a router at a time, in the order of the layers."""
    tape, each = ctx.tape, tokens(block.num_experts)
    mask = tape.new(tokens(1), Dtype.FP32, BALANCE) if ctx.masked else None
    total: Tensor | None = None
    named: list[Tensor] = []
    for scores in collected:
        low = scores if ctx.autocast is None else ops.to(scores, Dtype.FP32, BALANCE)
        shares = ops.softmax(low, low.dtype, ctx.device, BALANCE)
        del low
        named = [shares, *_chosen(shares, block)]
        part = _summed(ctx, shares, each, mask)
        del shares
        total = part if total is None else ops.add(total, part, BALANCE)
        del part
    assert total is not None
    named.clear()
    return ops.add(result, total, BALANCE, in_place=True)


def _chosen(shares: Tensor, block: MixtureOfExperts) -> tuple[Tensor, Tensor]:
    """``topk(shares)``, of one router."""
    return routed.best(shares, tokens(block.experts_per_token), BALANCE)


def _summed(ctx: BlockContext, shares: Tensor, each: Size, mask: Tensor | None) -> Tensor:
    """``shares.float().sum(dim=0)``, weighed by the mask where there is one; backward spreads it by a view."""
    tape, dtype, numel = ctx.tape, shares.dtype, shares.numel
    wide = tape.new(each, Dtype.FP32, BALANCE) if dtype is not Dtype.FP32 else None
    weighed = tape.new(each, Dtype.FP32, BALANCE) if mask is not None else None
    out = tape.new(const(1), Dtype.FP32, BALANCE)
    del wide, weighed

    def backward(node: Node, grads: list[Tensor | None]) -> list[Tensor | None]:
        made = tape.new(each, Dtype.FP32, ops.GRADIENTS) if node.saved else None
        result = tape.new(numel, dtype, ops.GRADIENTS)
        del made
        return [result]

    return tape.attach("sum", out, [shares], [mask] if mask is not None else [], backward)
