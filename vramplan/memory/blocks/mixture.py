"""Feed-forward blocks with experts: the order of router, routed experts and shared expert."""

from __future__ import annotations

from vramplan.facts.architecture import Linear, MixtureOfExperts
from vramplan.memory import ops, routed
from vramplan.memory.blocks.context import BlockContext
from vramplan.memory.blocks.experts import EXPERTS, run_experts
from vramplan.memory.blocks.folded import factor_parameters
from vramplan.memory.blocks.linear import linear_parameters, project
from vramplan.memory.blocks.llama4 import mixture_of_all
from vramplan.memory.blocks.mlp import MLP, gated
from vramplan.memory.blocks.router import route
from vramplan.memory.leaf import Parameter
from vramplan.memory.tape import Tensor


def mixture(ctx: BlockContext, x: Tensor, block: MixtureOfExperts) -> Tensor:
    """``mlp(x)`` (``MixtralSparseMoeBlock.forward``, ``Qwen2MoeSparseMoeBlock.forward``)."""
    if block.scoring == "sigmoid_of_all":
        return mixture_of_all(ctx, x, block)
    if block.shared is not None and block.shared_gate is None:
        return _beside_shared(ctx, x, block)
    if block.jitter:
        x = routed.jittered(x, EXPERTS)
    ctx.flat = True
    try:
        return ops.view(_routed(ctx, ops.view(x), block))
    finally:  # recomputing can end in the middle
        ctx.flat = False


def mixture_parameters(ctx: BlockContext, block: MixtureOfExperts) -> tuple[Parameter, ...]:
    """Every parameter of the block, adapters too, in registration order."""
    params: list[Parameter] = []
    for part in block.parts:
        linears = [part] if isinstance(part, Linear) else list(part.linears())
        if linears:
            params += [param for linear in linears for param in linear_parameters(ctx, linear)]
        else:
            params += [ctx.parameter(tensor.name, tensor.numel) for tensor in part.tensors()]
    return (*params, *(factor for pair in factor_parameters(ctx, block).values() for factor in pair))


def _routed(ctx: BlockContext, x: Tensor, block: MixtureOfExperts) -> Tensor:
    shared = _shared(ctx, x, block) if block.shared_gate is not None else None
    routing = route(ctx, x, block)
    out = run_experts(ctx, x, routing, block)
    if shared is not None and block.shared_gate is not None:
        share = ops.unary(project(ctx, x, block.shared_gate, MLP), MLP, "result")
        shared = ops.mul_broadcast(shared, share, MLP, small_first=True)
        del share
        out = ops.add(out, shared, EXPERTS)
    return out


def _beside_shared(ctx: BlockContext, x: Tensor, block: MixtureOfExperts) -> Tensor:
    """``DeepseekV3MoE.forward``: the shared expert sees sequences, and comes last."""
    ctx.flat = True
    try:
        routing = route(ctx, x, block)
        out = ops.view(run_experts(ctx, ops.view(x), routing, block))
    finally:
        ctx.flat = False
    out = ops.add(out, _shared(ctx, x, block), EXPERTS)
    del routing  # named until the block returns
    return out


def _shared(ctx: BlockContext, x: Tensor, block: MixtureOfExperts) -> Tensor:
    """``shared_expert(x)``."""
    mlp = block.shared
    assert mlp is not None
    name = mlp.projections[0].name.rpartition(".")[0]
    return ctx.call(name, (), lambda x: gated(ctx, x, mlp, name), x)
