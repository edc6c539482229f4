"""Sequence parallelism (Ulysses): attention of a share of the heads over the whole sequence.

Paper: Jacobs et al. 2023, "DeepSpeed Ulysses" (arXiv 2309.14509). Code:
deepspeed/runtime/sequence_parallel/ulysses_sp.py, ``UlyssesSPAttentionHF.forward``; deepspeed/sequence/layer.py,
``_dim_zero_all_to_all``. Before and after, a rank holds ``sequence / sp`` tokens of every head; between, the whole
sequence of ``heads / sp`` heads: as many elements.
"""

from __future__ import annotations

from collections.abc import Callable

from vramplan.facts.architecture import Attention
from vramplan.facts.dtype import Dtype
from vramplan.memory import ops
from vramplan.memory.blocks.context import BlockContext, tokens
from vramplan.memory.tape import Node, Tensor

LABEL = "attention core"
Core = Callable[[Tensor, Tensor, Tensor], Tensor]


def ulysses(ctx: BlockContext, q: Tensor, k: Tensor, v: Tensor, block: Attention, core: Core) -> Tensor:
    """``core`` of q, k and v gathered along the sequence and cut along the heads, and back."""
    degree = ctx.sequence_parallel
    positions = ctx.tape.new(tokens(2 * degree), Dtype.INT64, LABEL)  # gathered, and joined
    kv_heads = max(block.num_kv_heads, degree)  # replicated where the ranks are more
    whole = [
        _exchange(ctx, q, block.num_heads, block.num_heads),
        _exchange(ctx, k, block.num_kv_heads, kv_heads),
        _exchange(ctx, v, block.num_kv_heads, kv_heads),
    ]
    wide_q, wide_k, wide_v = whole
    whole.clear()
    wide_q = _ordered(ctx, wide_q, block.num_heads // degree)
    wide_k = _ordered(ctx, wide_k, kv_heads // degree)
    wide_v = _ordered(ctx, wide_v, kv_heads // degree)
    out = core(wide_q, wide_k, wide_v)
    out = out if ctx.lone_sequence else ops.clone(out, LABEL)
    sent = all_to_all(out, copied=True)
    out = ops.clone(sent, LABEL)  # heads of every rank side by side
    del sent, positions
    return out if ctx.lone_sequence else ops.clone(out, LABEL)


def _exchange(ctx: BlockContext, x: Tensor, heads: int, wide_heads: int) -> Tensor:
    """``combine_sequence``: heads are repeated if need be, grouped by rank, and exchanged."""
    local = wide_heads // ctx.sequence_parallel
    if wide_heads > heads:
        x = _repeated(x, wide_heads // heads)
    grouped = _regrouped(x, merges=local == 1)
    del x
    return all_to_all(grouped, copied=not _in_order(ctx, local))


def _ordered(ctx: BlockContext, x: Tensor, local_heads: int) -> Tensor:
    """``rearrange(x, "sl bs hc hs -> bs hc sl hs").contiguous()``: a copy unless one head of one sequence is alone."""
    return ops.view(x) if _in_order(ctx, local_heads) else ops.clone(x, LABEL)


def _in_order(ctx: BlockContext, local_heads: int) -> bool:
    return local_heads == 1 and ctx.lone_sequence


def _repeated(x: Tensor, times: int) -> Tensor:
    """``repeat_interleave`` of heads; its backward sums the copies."""
    tape, small, dtype = x.storage.tape, x.numel, x.dtype
    out = tape.new(ops.resized(small, times), dtype, LABEL)
    return tape.attach("repeat", out, [x], [], lambda node, grads: [tape.new(small, dtype, ops.GRADIENTS)])


def _regrouped(x: Tensor, merges: bool) -> Tensor:
    """``rearrange(...).contiguous()`` into one block a rank; backward merges the ranks' heads again, by a copy unless
    each has one."""
    tape, numel, dtype = x.storage.tape, x.numel, x.dtype
    out = tape.new(numel, dtype, LABEL)

    def backward(node: Node, grads: list[Tensor | None]) -> list[Tensor | None]:
        return [grads[0] if merges else tape.new(numel, dtype, ops.GRADIENTS)]

    return tape.attach("regroup", out, [x], [], backward)


def all_to_all(x: Tensor, copied: bool) -> Tensor:
    """``_dim_zero_all_to_all``: a new tensor each way; ``copied``: its gradient is made contiguous first."""
    tape, numel, dtype = x.storage.tape, x.numel, x.dtype
    out = tape.new(numel, dtype, LABEL)

    def backward(node: Node, grads: list[Tensor | None]) -> list[Tensor | None]:
        contiguous = tape.new(numel, dtype, ops.GRADIENTS) if copied else None
        result = tape.new(numel, dtype, ops.GRADIENTS)
        del contiguous
        return [result]

    return tape.attach("all_to_all", out, [x], [], backward)
