"""DeepSpeed's chunked cross-entropy: whole logits in their own format, fp32 a block of tokens at a time.

Read in deepspeed 0.19.8 (runtime/chunked_cross_entropy.py): on CUDA a Triton kernel that needs no block at all, else
``_ChunkedCrossEntropy``.
"""

from __future__ import annotations

from vramplan.facts.dtype import Dtype
from vramplan.memory import ops
from vramplan.memory.blocks.context import BlockContext, tokens
from vramplan.memory.blocks.head import LOSS, TOKENS
from vramplan.memory.size import ZERO, Size, const
from vramplan.memory.tape import Node, Tensor

BLOCK_NUMEL = 1 << 26
"""``_BLOCK_ELEMENTS``: fp32 elements of a block."""
Rows = tuple[int, int]
"""Tokens of the first block and of the one that follows; (0, 0): one block has all."""


def block_rows(num_tokens: int, vocab_size: int) -> Rows:
    """The blocks of a micro-batch on one rank (``_block_rows``)."""
    rows = max(1, BLOCK_NUMEL // vocab_size)
    return (rows, min(rows, num_tokens - rows)) if rows < num_tokens else (0, 0)


def chunked_loss(ctx: BlockContext, scores: Tensor, vocab_size: int, rows: Rows) -> Tensor:
    """``ChunkedCausalLMLoss``: the mean over the targets."""
    tape = ctx.tape
    padded, targets = (tape.new(tokens(1), Dtype.INT64, TOKENS) for _ in range(2))
    asked = tape.new(tokens(4), Dtype.BOOL, LOSS)  # whether a target is out of range
    del asked
    out_of_range = tape.new(tokens(1), Dtype.BOOL, LOSS)
    losses = _by_kernel(scores, targets) if ctx.device == "cuda" else _by_block(scores, vocab_size, rows)
    valid = tape.new(tokens(1), Dtype.BOOL, LOSS)  # how many targets there are
    result = tape.new(const(1), Dtype.FP32, LOSS)
    result.node = losses.node
    del losses, valid, out_of_range, padded, targets
    return result


def _by_kernel(scores: Tensor, targets: Tensor) -> Tensor:
    """``_TritonCrossEntropy``: reads the logits as they are, and writes their gradient."""
    tape, numel, dtype = scores.storage.tape, scores.numel, scores.dtype
    log_sum_exp, losses = (tape.new(tokens(1), Dtype.FP32, LOSS) for _ in range(2))

    def backward(node: Node, grads: list[Tensor | None]) -> list[Tensor | None]:
        held = [node.unpack(index) for index in range(len(node.saved))]
        grad = tape.new(numel, dtype, ops.GRADIENTS)
        row_scale = tape.new(tokens(1), Dtype.FP32, ops.TEMPORARY)
        del held, row_scale
        return [grad]

    return tape.attach("chunked loss", losses, [scores], [scores, targets, log_sum_exp], backward)


def _by_block(scores: Tensor, vocab_size: int, rows: Rows) -> Tensor:
    """``_ChunkedCrossEntropy``: each block and what is made of it have names that last until the next block's."""
    tape, numel, dtype = scores.storage.tape, scores.numel, scores.dtype
    first, second = (const(each * vocab_size) for each in rows) if rows[0] else (numel, ZERO)

    def block(of: Size, label: str) -> Tensor:
        return tape.new(of, Dtype.FP32, label)

    valid, safe = tape.new(tokens(1), Dtype.BOOL, LOSS), tape.new(tokens(1), Dtype.INT64, LOSS)
    log_sum_exp, target_logits = (block(tokens(1), LOSS) for _ in range(2))
    wide = block(first if dtype is not Dtype.FP32 else ZERO, LOSS)
    less_maximum = block(first, LOSS)  # torch.logsumexp
    del wide, less_maximum
    differences, losses = (block(tokens(1), LOSS) for _ in range(2))
    del target_logits, differences

    def backward(node: Node, grads: list[Tensor | None]) -> list[Tensor | None]:
        held = [node.unpack(index) for index in range(len(node.saved))]
        row_scale = block(tokens(1), ops.TEMPORARY)
        grad = tape.new(numel, dtype, ops.GRADIENTS)
        before: Tensor | None = None
        for size in (first, second):
            exponents = block(size, ops.TEMPORARY)
            probabilities = block(size, ops.TEMPORARY)
            before = probabilities
            del exponents, probabilities
        del before, row_scale, held
        return [grad]

    return tape.attach("chunked loss", losses, [scores], [scores, safe, valid, log_sum_exp], backward)
