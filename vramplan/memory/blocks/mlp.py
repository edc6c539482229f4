"""Feed-forward blocks: gated (Llama) and plain (GPT-2), with the activation functions op by op."""

from __future__ import annotations

from vramplan.errors import UnknownNameError
from vramplan.facts.architecture import GatedMLP, PlainMLP
from vramplan.facts.dtype import Dtype
from vramplan.memory import ops
from vramplan.memory.blocks.bloom import bloom_gelu
from vramplan.memory.blocks.context import BlockContext, tokens
from vramplan.memory.blocks.liger import liger_swiglu
from vramplan.memory.blocks.linear import project
from vramplan.memory.tape import Tensor

MLP = "feed-forward"

_ONE_KERNEL = {"silu", "swish", "gelu", "gelu_pytorch_tanh", "gelu_python_tanh", "relu"}
"""Activations that are one fused operator which saves its input (relu: its result, of the same size)."""


def activate(ctx: BlockContext, x: Tensor, name: str, owner: str = "mlp", label: str = MLP) -> Tensor:
    """``ACT2FN[name](x)`` (transformers/activations.py), a module of ``owner``'s."""
    return ctx.call(f"{owner}.act_fn", (), lambda x: _activation(ctx, x, name, label), x)


def _activation(ctx: BlockContext, x: Tensor, name: str, label: str) -> Tensor:
    if name in _ONE_KERNEL:
        return ops.unary(x, label, "input" if name != "relu" else "result")
    if name in ("gelu_new", "gelu_fast"):
        return _gelu_new(x, label, wide_powers=ctx.autocast is not None and ctx.device == "cuda")
    if name == "bloom_gelu":
        return bloom_gelu(x, label)
    raise UnknownNameError("activation function", name, [*_ONE_KERNEL, "gelu_new", "gelu_fast"])


def _gelu_new(x: Tensor, label: str, wide_powers: bool) -> Tensor:
    """``0.5 * x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x ** 3)))``, one operator at a time; none of the results
    has a name, so each goes as soon as the next is there.

    ``wide_powers``: CUDA's autocast takes powers in fp32 (``AT_FORALL_FP32``), and what follows keeps that format.
    """
    half = ops.scaled(x, label)

    def cubed() -> Tensor:
        return ops.unary(ops.to(x, Dtype.FP32, label) if wide_powers else x, label, "input", temporaries=2)

    def turned() -> Tensor:
        return ops.unary(ops.scaled(ops.add(x, ops.scaled(cubed(), label), label), label), label, "result")

    return ops.mul(half, ops.shifted(turned(), label), label)


def gated(ctx: BlockContext, x: Tensor, block: GatedMLP, owner: str = "mlp") -> Tensor:
    """``down(act(gate(x)) * up(x))`` (``LlamaMLP.forward``), the two halves of one projection where it is fused."""
    if block.fused:
        both = project(ctx, x, block.projections[0], MLP)
        gate, up = ops.split(both, [tokens(block.intermediate), tokens(block.intermediate)])
        del both
        return project(ctx, ops.mul(up, activate(ctx, gate, block.activation, owner), MLP), block.projections[1], MLP)
    gate_proj, up_proj, down_proj = block.projections
    if ctx.liger_kernels:
        product = liger_swiglu(project(ctx, x, gate_proj, MLP), project(ctx, x, up_proj, MLP), MLP)
        return project(ctx, product, down_proj, MLP)
    return project(
        ctx,
        ops.mul(
            activate(ctx, project(ctx, x, gate_proj, MLP), block.activation, owner),
            project(ctx, x, up_proj, MLP),
            MLP,
        ),
        down_proj,
        MLP,
    )


def plain(ctx: BlockContext, x: Tensor, block: PlainMLP) -> Tensor:
    """``dropout(down(act(up(x))))`` (``GPT2MLP.forward``)."""
    x = project(ctx, x, block.projections[0], MLP)
    x = activate(ctx, x, block.activation)
    x = project(ctx, x, block.projections[1], MLP)
    return ctx.dropout(x, block.dropout, MLP, block.dropout_module)
