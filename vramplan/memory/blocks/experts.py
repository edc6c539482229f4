"""Routed experts as transformers runs them by default: rows sorted by expert, one grouped product for all of them.

Every activation has a row for each (token, expert) pair, whatever the routing (transformers 5.17, integrations/moe.py,
``grouped_mm_experts_forward``).
"""

from __future__ import annotations

from vramplan.facts.architecture import MixtureOfExperts
from vramplan.facts.dtype import Dtype
from vramplan.memory import ops, routed
from vramplan.memory.blocks.context import BlockContext, tokens
from vramplan.memory.blocks.folded import Factors, fold, in_wrappers
from vramplan.memory.blocks.linear import recomputed
from vramplan.memory.blocks.mlp import activate
from vramplan.memory.blocks.router import Routing
from vramplan.memory.leaf import Parameter
from vramplan.memory.size import Size, const
from vramplan.memory.tape import Tensor

EXPERTS = "routed experts"


def run_experts(ctx: BlockContext, x: Tensor, routing: Routing, block: MixtureOfExperts) -> Tensor:
    """``experts(x, top_k_index, top_k_weights)`` of x as a matrix (tokens, features)."""
    params = {
        tensor.name.rpartition(".")[2]: ctx.parameter(tensor.name, tensor.numel) for tensor in block.experts.tensors()
    }
    return in_wrappers(ctx, x, block, params, lambda x, factors: _grouped(ctx, x, routing, block, params, factors))


def _grouped(
    ctx: BlockContext,
    x: Tensor,
    routing: Routing,
    block: MixtureOfExperts,
    params: dict[str, Parameter],
    factors: dict[str, Factors],
) -> Tensor:
    tape, k, given = ctx.tape, block.experts_per_token, x.dtype
    pairs, wide, both = tokens(k), tokens(k * block.experts.hidden_size), tokens(2 * k * block.experts.intermediate)
    sorted_experts, order = (tape.new(pairs, Dtype.INT64, EXPERTS) for _ in range(2))
    scratch = tape.new(pairs, Dtype.INT64, ops.TEMPORARY)
    del scratch
    selected = routed.rows(x, tape.new(pairs, Dtype.INT64, EXPERTS), wide, EXPERTS)
    weights = routed.rows(ops.view(routing.weights), order, pairs, EXPERTS)
    histogram_input = tape.new(pairs, Dtype.FP32, EXPERTS)
    counts = tape.new(const(block.num_experts), Dtype.FP32, EXPERTS)
    offsets = tape.new(const(block.num_experts), Dtype.INT32, EXPERTS)
    mask = tape.new(pairs, Dtype.BOOL, EXPERTS)
    gate_up: Tensor = params["gate_up_proj"]
    if "gate_up_proj" in factors:
        gate_up = fold(ctx, params["gate_up_proj"], factors["gate_up_proj"])
    bias = _bias(params.get("gate_up_proj_bias"), sorted_experts, both)
    selected = routed.filled(selected, mask, EXPERTS, in_place=True)
    rows = _product(ctx, selected, gate_up, bias, offsets, block, both)
    rows = routed.filled(rows, mask, EXPERTS)
    rows = _gate(ctx, rows, block)
    down: Tensor = params["down_proj"]
    if "down_proj" in factors:
        down = fold(ctx, params["down_proj"], factors["down_proj"])
    bias = _bias(params.get("down_proj_bias"), sorted_experts, wide)
    rows = _product(ctx, rows, down, bias, offsets, block, wide)
    rows = routed.filled(rows, mask, EXPERTS)
    weighted = ops.mul_broadcast(rows, weights, EXPERTS)
    back = tape.new(pairs, Dtype.INT64, EXPERTS)
    counted = tape.new(pairs, Dtype.INT64, ops.TEMPORARY)
    del counted
    weighted = routed.rows(weighted, back, wide, EXPERTS)
    out = routed.summed(weighted, k, tokens(block.experts.hidden_size), EXPERTS)
    out = ops.to(out, given, EXPERTS)
    del sorted_experts, histogram_input, counts, bias, gate_up, down  # named until the function returns
    return out


def _bias(bias: Parameter | None, experts: Tensor, numel: Size) -> Tensor | None:
    """``bias[expert_ids]``: a row of it for each pair."""
    return None if bias is None else routed.rows(bias, experts, numel, EXPERTS)


def _product(
    ctx: BlockContext,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    offsets: Tensor,
    block: MixtureOfExperts,
    numel: Size,
) -> Tensor:
    """``_grouped_linear``: in the weight's format, whatever autocast says. A weight that is stored (experts, out, in)
    is saved as its transposed view, which outlives a gathered weight's release."""
    whole = None
    if isinstance(weight, Parameter):
        as_view = not block.experts.transposed
        whole = ctx.hooks.whole(weight.name) if ctx.hooks is not None and as_view else recomputed(ctx, weight)
    out = routed.grouped_product(ops.to(x, weight.dtype, EXPERTS), weight, offsets, numel, EXPERTS, whole)
    return out if bias is None else ops.add(out, bias, EXPERTS, in_place=True)


def _gate(ctx: BlockContext, rows: Tensor, block: MixtureOfExperts) -> Tensor:
    """``_default_apply_gate``: ``act(gate) * up`` of the two halves."""
    half = tokens(block.experts_per_token * block.experts.intermediate)
    if block.activation == "gpt_oss_glu":
        return _clamped_gate(rows, half)
    gate, up = ops.split(rows, [half, half])
    return ops.mul(activate(ctx, gate, block.activation, block.experts.name, EXPERTS), up, EXPERTS)


def _clamped_gate(rows: Tensor, half: Size) -> Tensor:
    """``GptOssExperts._apply_gate``: ``(up + 1) * gate * sigmoid(alpha * gate)`` of every second feature each."""
    gate, up = ops.piece(rows, half), ops.piece(rows, half)
    gate = ops.clamped_copy(gate, 1, EXPERTS)
    up = ops.clamped_copy(up, 2, EXPERTS)
    glu = ops.mul(gate, ops.unary(ops.scaled(gate, EXPERTS), EXPERTS, "result"), EXPERTS)
    return ops.mul(ops.shifted(up, EXPERTS), glu, EXPERTS)
