"""Rotary positions in the ways that families write them; ``Attention.rotary`` says which."""

from __future__ import annotations

from dataclasses import replace

from vramplan.facts.architecture import Attention, LatentAttention
from vramplan.facts.dtype import Dtype
from vramplan.memory import ops
from vramplan.memory.blocks.context import BlockContext, Module
from vramplan.memory.blocks.liger import liger_rotary
from vramplan.memory.blocks.sinks import rotate_halves
from vramplan.memory.tape import Tensor

CORE = "attention core"
TABLES = "rotary tables"


def rotary_tables(ctx: BlockContext, attentions: list[Attention | LatentAttention], of_kind: bool) -> None:
    """``cos`` and ``sin`` for every position, shared by layers and by the batch.

    ``of_kind``: layers with a sliding window and those without have tables of their own (Gemma-3).
    """
    rotated = [block for block in attentions if block.rotary_dim]
    first = attentions[0]
    if not rotated and isinstance(first, Attention) and first.core == "falcon":  # makes them whatever it does with them
        rotated = [replace(first, rotary_dim=first.head_dim)]
    if not rotated:
        return
    ctx.tables.rotary = ctx.tables.window_rotary = _tables(ctx, rotated[0])
    if of_kind and len({block.local_window for block in rotated}) > 1:
        ctx.tables.window_rotary = _tables(ctx, rotated[0])


def _tables(ctx: BlockContext, block: Attention | LatentAttention) -> tuple[Tensor, ...]:
    """``LlamaRotaryEmbedding.forward``."""
    module = Module("model.rotary_emb", ())
    if ctx.hooks is not None:
        ctx.hooks.before_forward(module)
    tables = _complex_table(ctx, block) if block.rotary == "complex" else _cos_and_sin(ctx, block)
    if ctx.hooks is not None:
        ctx.hooks.after_forward(module)
    return tables


def _cos_and_sin(ctx: BlockContext, block: Attention | LatentAttention) -> tuple[Tensor, Tensor]:
    numel = ctx.at_positions(block.rotary_dim // 2 if block.rotary == "halves" else block.rotary_dim)
    frequencies = ctx.tape.new(ctx.at_positions(block.rotary_dim // 2), Dtype.FP32, TABLES)
    angles = ctx.tape.new(numel, Dtype.FP32, TABLES)
    del frequencies
    wide_cos = ctx.tape.new(numel, Dtype.FP32, TABLES)
    wide_sin = ctx.tape.new(numel, Dtype.FP32, TABLES)
    kept = Dtype.FP32 if block.rotary == "fp32" else ctx.dtype
    tables = ops.to(wide_cos, kept, TABLES), ops.to(wide_sin, kept, TABLES)
    del angles
    return tables


def _complex_table(ctx: BlockContext, block: Attention | LatentAttention) -> tuple[Tensor]:
    """``DeepseekV2RotaryEmbedding.forward``: a complex number is two elements."""
    angles = ctx.tape.new(ctx.at_positions(block.rotary_dim // 2), Dtype.FP32, TABLES)
    ones = ctx.tape.new(ctx.at_positions(block.rotary_dim // 2), Dtype.FP32, TABLES)
    unit = ctx.tape.new(ctx.at_positions(block.rotary_dim), Dtype.FP32, TABLES)
    del ones
    scaled = ctx.tape.new(ctx.at_positions(block.rotary_dim), Dtype.FP32, TABLES)
    del unit, angles
    return (scaled,)


def rotate_latent(ctx: BlockContext, q: Tensor, k: Tensor, block: LatentAttention) -> tuple[Tensor, Tensor]:
    """Positions of the rotated elements of all query heads, and of those that the heads of the keys share."""
    assert ctx.tables.rotary is not None
    if block.rotary == "complex":
        return _rotate_complex(q, k, ctx.tables.rotary[0])
    cos, sin = ctx.tables.rotary
    if block.rotary == "whole":
        return _rotate(q, cos, sin), _rotate(k, cos, sin)
    q_pair, k_pair = _pair(q), _pair(k)
    return _rotate_pair(q_pair, cos, sin), _rotate_pair(k_pair, cos, sin)


def _pair(x: Tensor) -> tuple[Tensor, Tensor]:
    """``x[..., 0::2], x[..., 1::2]``."""
    half = ops.resized(x.numel, 1, 2)
    return ops.piece(x, half), ops.piece(x, half)


def _rotate_pair(pair: tuple[Tensor, Tensor], cos: Tensor, sin: Tensor) -> Tensor:
    """``cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin])`` (``apply_rotary_pos_emb_interleave``)."""
    even, odd = pair
    first = ops.sub(ops.mul_broadcast(even, cos, CORE), ops.mul_broadcast(odd, sin, CORE), CORE)
    second = ops.add(ops.mul_broadcast(odd, cos, CORE), ops.mul_broadcast(even, sin, CORE), CORE)
    return ops.cat([first, second], ops.resized(even.numel, 2), CORE)


def _rotate_complex(q: Tensor, k: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """``apply_rotary_emb`` of DeepSeek-V2."""
    wide_q = ops.view(ops.to(q, Dtype.FP32, CORE))
    wide_k = ops.view(ops.to(k, Dtype.FP32, CORE))
    turned_q = ops.to(ops.view(ops.mul_broadcast(wide_q, table, CORE)), q.dtype, CORE)
    turned_k = ops.to(ops.view(ops.mul_broadcast(wide_k, table, CORE)), k.dtype, CORE)
    return turned_q, turned_k


def _rotate_complex_together(q: Tensor, k: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """``apply_rotary_emb`` of Llama-4: all four names stay until it returns."""
    wide_q = ops.view(ops.to(q, Dtype.FP32, CORE))
    wide_k = ops.view(ops.to(k, Dtype.FP32, CORE))
    turned_q = ops.view(ops.mul_broadcast(wide_q, table, CORE))
    turned_k = ops.view(ops.mul_broadcast(wide_k, table, CORE))
    return ops.to(turned_q, q.dtype, CORE), ops.to(turned_k, k.dtype, CORE)


def rotate_both(ctx: BlockContext, q: Tensor, k: Tensor, block: Attention) -> tuple[Tensor, Tensor]:
    """``apply_rotary_pos_emb(q, k, cos, sin)``."""
    tables = ctx.tables.rotary if block.local_window is None else ctx.tables.window_rotary
    assert tables is not None
    if block.rotary == "complex":
        return _rotate_complex_together(q, k, tables[0])
    cos, sin = tables
    if ctx.liger_kernels:
        copied = ctx.attention == "eager" or (ctx.sequence_parallel > 1 and not ctx.lone_sequence)
        return liger_rotary(q, k, (cos, sin), copied, CORE)
    if block.rotary in ("sliced", "named_slices", "paired"):
        return _rotate_slices(ctx, q, k, (cos, sin), block)
    if block.rotary == "halves":
        return rotate_halves(q, cos, sin), rotate_halves(k, cos, sin)
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
