"""Liger's kernels for norms, rotary positions and gated MLPs: each is one node that works in place where it can.

Read in liger-kernel 0.8.5 (ops/rms_norm.py, ops/rope.py, ops/swiglu.py); nothing of it was measured, since Triton
needs a GPU. The weight's gradient of a norm is first summed by each multiprocessor (4 bytes x multiprocessors x width,
2 MiB for 132 of them and 4,096 features): left out.
"""

from __future__ import annotations

from vramplan.facts.dtype import Dtype
from vramplan.memory.kernels import WEIGHT_GRADIENT
from vramplan.memory.leaf import Parameter
from vramplan.memory.size import Size
from vramplan.memory.tape import Node, Tensor
from vramplan.memory.views import GRADIENTS

FAMILIES = frozenset(["llama", "mistral", "qwen2", "qwen3"])
"""Families with Llama's norm, rotation and MLP, all of which liger-kernel replaces by the kernels here
(transformers/monkey_patch.py)."""


def liger_rms(x: Tensor, weight: Parameter, rows: Size, label: str) -> Tensor:
    """``LigerRMSNormFunction``: saves x and an fp32 number a row; the gradient of x takes the place of the result's."""
    tape, dtype = x.storage.tape, x.dtype
    out = tape.new(x.numel, dtype, label)
    deviations = tape.new(rows, Dtype.FP32, label)
    need_w = weight.requires_grad

    def backward(node: Node, grads: list[Tensor | None]) -> list[Tensor | None]:
        held = [node.unpack(0), node.unpack(1)]
        grad_w = tape.new(weight.numel, weight.dtype, WEIGHT_GRADIENT) if need_w else None
        del held
        return [grads[0], grad_w]

    return tape.attach("liger_rms_norm", out, [x, weight], [x, deviations], backward)


def liger_rotary(
    q: Tensor, k: Tensor, tables: tuple[Tensor, Tensor], copied: bool, label: str
) -> tuple[Tensor, Tensor]:
    """``LigerRopeFunction``: turns queries and keys, and their gradients, in place; saves the tables alone.

    ``copied``: gradients come with heads before positions and are copied first.
    """
    tape, numels, dtype = q.storage.tape, (q.numel, k.numel), q.dtype

    def backward(node: Node, grads: list[Tensor | None]) -> list[Tensor | None]:
        held = [node.unpack(0), node.unpack(1)]
        given: list[Tensor | None] = [tape.new(numel, dtype, GRADIENTS) for numel in numels] if copied else list(grads)
        del held
        return given

    outs = [Tensor(part.storage, part.numel, part.dtype) for part in (q, k)]
    tape.attach("liger_rope", outs[0], [q, k], list(tables), backward)
    node = outs[0].node
    if node is not None:
        node.num_outputs = 2
        outs[1].node, outs[1].slot = node, 1
    return outs[0], outs[1]


def liger_swiglu(gate: Tensor, up: Tensor, label: str) -> Tensor:
    """``LigerSiLUMulFunction``: saves gate and up; their gradients take their places."""
    tape = gate.storage.tape
    out = tape.new(gate.numel, gate.dtype, label)

    def backward(node: Node, grads: list[Tensor | None]) -> list[Tensor | None]:
        results: list[Tensor | None] = []
        for index in range(2):
            held = node.unpack(index)
            tape.relabel(held.storage, GRADIENTS)
            results.append(Tensor(held.storage, held.numel, held.dtype))
        return results

    return tape.attach("liger_swiglu", out, [gate, up], [gate, up], backward)
