"""Rotary positions in the five ways that families write them; ``Attention.rotary`` says which."""

from __future__ import annotations

from dataclasses import replace

from vramplan.facts.architecture import Attention
from vramplan.facts.dtype import Dtype
from vramplan.memory import ops
from vramplan.memory.blocks.context import BlockContext, Module
from vramplan.memory.size import per_position
from vramplan.memory.tape import Tensor

CORE = "attention core"
TABLES = "rotary tables"


def rotary_tables(ctx: BlockContext, attentions: list[Attention], of_kind: bool) -> None:
    """``cos`` and ``sin`` for every position, shared by layers and by the batch.

    ``of_kind``: layers with a sliding window and those without have tables of their own (Gemma-3).
    """
    rotated = [block for block in attentions if block.rotary_dim]
    if not rotated and attentions[0].core == "falcon":  # makes them whatever its positions are
        rotated = [replace(attentions[0], rotary_dim=attentions[0].head_dim)]
    if not rotated:
        return
    ctx.tables.rotary = ctx.tables.window_rotary = _tables(ctx, rotated[0])
    if of_kind and len({block.sliding_window for block in rotated}) > 1:
        ctx.tables.window_rotary = _tables(ctx, rotated[0])


def _tables(ctx: BlockContext, block: Attention) -> tuple[Tensor, Tensor]:
    """``LlamaRotaryEmbedding.forward``."""
    module = Module("model.rotary_emb", ())
    if ctx.hooks is not None:
        ctx.hooks.before_forward(module)
    numel = per_position(block.rotary_dim)
    frequencies = ctx.tape.new(per_position(block.rotary_dim // 2), Dtype.FP32, TABLES)
    angles = ctx.tape.new(numel, Dtype.FP32, TABLES)
    del frequencies
    wide_cos = ctx.tape.new(numel, Dtype.FP32, TABLES)
    wide_sin = ctx.tape.new(numel, Dtype.FP32, TABLES)
    kept = Dtype.FP32 if block.rotary == "fp32" else ctx.dtype
    tables = ops.to(wide_cos, kept, TABLES), ops.to(wide_sin, kept, TABLES)
    del angles
    if ctx.hooks is not None:
        ctx.hooks.after_forward(module)
    return tables


def rotate_both(ctx: BlockContext, q: Tensor, k: Tensor, block: Attention) -> tuple[Tensor, Tensor]:
    """``apply_rotary_pos_emb(q, k, cos, sin)``."""
    tables = ctx.tables.rotary if block.sliding_window is None else ctx.tables.window_rotary
    assert tables is not None
    cos, sin = tables
    if block.rotary in ("sliced", "named_slices", "paired"):
        return _rotate_slices(ctx, q, k, (cos, sin), block)
    source = q.dtype
    if block.rotary == "fp32_inputs":
        q, k = ops.to(q, Dtype.FP32, CORE), ops.to(k, Dtype.FP32, CORE)
    rotated_q = _rotate(q, cos, sin)
    rotated_k = _rotate(k, cos, sin)
    if block.rotary in ("fp32", "fp32_inputs"):
        return ops.to(rotated_q, source, CORE), ops.to(rotated_k, source, CORE)
    return rotated_q, rotated_k


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``(x * cos) + (rotate_half(x) * sin)``."""
    straight = ops.mul_broadcast(x, cos, CORE)
    turned = ops.mul_broadcast(_rotate_half(x), sin, CORE)
    return ops.add(straight, turned, CORE)


def _rotate_half(x: Tensor) -> Tensor:
    """``cat((-x2, x1))`` of the two halves of each head, or of its odd and even elements."""
    half = ops.resized(x.numel, 1, 2)
    first = ops.piece(x, half)
    second = ops.piece(x, half)
    return ops.cat([ops.unary(second, CORE, "nothing"), first], x.numel, CORE)


def _rotate_slices(
    ctx: BlockContext, q: Tensor, k: Tensor, tables: tuple[Tensor, Tensor], block: Attention
) -> tuple[Tensor, Tensor]:
    """The first ``rotary_dim`` elements of each head are cut out, rotated and joined with the rest."""
    cos, sin = tables
    if block.rotary == "paired":
        cos, sin = (ops.to_copy(table, TABLES) for table in tables)
    q_turned, q_rest = _cut(q, block)
    k_turned, k_rest = _cut(k, block)
    q_turned = _rotate(q_turned, cos, sin)
    k_turned = _rotate(k_turned, cos, sin)
    if block.rotary == "named_slices":
        ctx.frame += [q_turned, q_rest, k_turned, k_rest]
    return ops.cat([q_turned, q_rest], q.numel, CORE), ops.cat([k_turned, k_rest], k.numel, CORE)


def _cut(x: Tensor, block: Attention) -> tuple[Tensor, Tensor]:
    turned = ops.resized(x.numel, block.rotary_dim, block.head_dim)
    rest = ops.resized(x.numel, block.head_dim - block.rotary_dim, block.head_dim)
    return ops.piece(x, turned), ops.piece(x, rest)
