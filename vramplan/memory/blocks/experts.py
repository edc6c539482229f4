"""Routed experts as transformers runs them by default: rows sorted by expert, one grouped product for all of them.

Every activation has a row for each (token, expert) pair, whatever the routing (transformers 5.17, integrations/moe.py,
``grouped_mm_experts_forward``).
"""

from __future__ import annotations

from vramplan.facts.architecture import MixtureOfExperts
from vramplan.facts.dtype import Dtype
from vramplan.memory import ops, routed
from vramplan.memory.blocks.context import BlockContext, tokens
from vramplan.memory.blocks.linear import recomputed
from vramplan.memory.blocks.mlp import activate
from vramplan.memory.blocks.router import Routing
from vramplan.memory.size import const
from vramplan.memory.tape import Parameter, Tensor

EXPERTS = "routed experts"


def run_experts(ctx: BlockContext, x: Tensor, routing: Routing, block: MixtureOfExperts) -> Tensor:
    """``experts(x, top_k_index, top_k_weights)`` of x as a matrix (tokens, features)."""
    experts = block.experts
    matrix = experts.num_experts * experts.hidden_size * experts.intermediate
    gate_up = ctx.parameter(f"{experts.name}.gate_up_proj", 2 * matrix)
    down = ctx.parameter(f"{experts.name}.down_proj", matrix)
    return ctx.call(experts.name, (gate_up, down), lambda x: _grouped(ctx, x, routing, block, gate_up, down), x)


def _grouped(
    ctx: BlockContext, x: Tensor, routing: Routing, block: MixtureOfExperts, gate_up: Parameter, down: Parameter
) -> Tensor:
    tape, k, given = ctx.tape, block.experts_per_token, x.dtype
    pairs, wide, inner = tokens(k), tokens(k * block.experts.hidden_size), tokens(k * block.experts.intermediate)
    sorted_experts, order = (tape.new(pairs, Dtype.INT64, EXPERTS) for _ in range(2))
    scratch = tape.new(pairs, Dtype.INT64, ops.TEMPORARY)
    del scratch
    selected = routed.rows(x, tape.new(pairs, Dtype.INT64, EXPERTS), wide, EXPERTS)
    weights = routed.rows(ops.view(routing.weights), order, pairs, EXPERTS)
    histogram_input = tape.new(pairs, Dtype.FP32, EXPERTS)
    counts = tape.new(const(block.num_experts), Dtype.FP32, EXPERTS)
    offsets = tape.new(const(block.num_experts), Dtype.INT32, EXPERTS)
    mask = tape.new(pairs, Dtype.BOOL, EXPERTS)
    selected = routed.filled(selected, mask, EXPERTS, in_place=True)
    rows = _product(ctx, selected, gate_up, offsets, block, 2 * inner[1])
    rows = routed.filled(rows, mask, EXPERTS)
    rows = _gate(ctx, rows, block)
    rows = _product(ctx, rows, down, offsets, block, wide[1])
    rows = routed.filled(rows, mask, EXPERTS)
    weighted = ops.mul_broadcast(rows, weights, EXPERTS)
    back = tape.new(pairs, Dtype.INT64, EXPERTS)
    counted = tape.new(pairs, Dtype.INT64, ops.TEMPORARY)
    del counted
    weighted = routed.rows(weighted, back, wide, EXPERTS)
    out = routed.summed(weighted, k, tokens(block.experts.hidden_size), EXPERTS)
    out = ops.to(out, given, EXPERTS)
    del sorted_experts, histogram_input, counts  # named until the function returns
    return out


def _product(
    ctx: BlockContext, x: Tensor, weight: Parameter, offsets: Tensor, block: MixtureOfExperts, out_width: int
) -> Tensor:
    """``_grouped_linear``: in the weight's format, whatever autocast says. A weight that is stored (experts, out, in)
    is saved as its transposed view, which outlives a gathered weight's release."""
    as_view = not block.experts.transposed
    whole = ctx.hooks.whole(weight.name) if ctx.hooks is not None and as_view else recomputed(ctx, weight)
    return routed.grouped_product(ops.to(x, weight.dtype, EXPERTS), weight, offsets, tokens(out_width), EXPERTS, whole)


def _gate(ctx: BlockContext, rows: Tensor, block: MixtureOfExperts) -> Tensor:
    """``_default_apply_gate``: ``act(gate) * up`` of the two halves."""
    half = tokens(block.experts_per_token * block.experts.intermediate)
    gate, up = ops.split(rows, [half, half])
    return ops.mul(activate(ctx, gate, block.activation, block.experts.name, EXPERTS), up, EXPERTS)
