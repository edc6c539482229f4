"""Liger's fused linear cross-entropy: the head's product and the loss, a chunk of tokens at a time.

Read in liger-kernel 0.8.5 (ops/fused_linear_cross_entropy.py, ``fused_linear_cross_entropy_forward``), on CUDA.
Gradients are made in forward and kept for backward; logits are never whole.
"""

from __future__ import annotations

from vramplan.facts.architecture import Architecture
from vramplan.facts.dtype import Dtype
from vramplan.memory import ops
from vramplan.memory.blocks.context import BlockContext, tokens
from vramplan.memory.blocks.head import LOGITS, LOSS, TOKENS, head_weight
from vramplan.memory.blocks.linear import cast_of_weight
from vramplan.memory.leaf import Parameter
from vramplan.memory.size import Size, const
from vramplan.memory.tape import Node, Tensor

FAMILIES = frozenset(
    [
        "gemma",
        "gemma2",
        "gemma3",
        "granite",
        "llama",
        "mistral",
        "mixtral",
        "olmo2",
        "phi3",
        "qwen2",
        "qwen3",
        "qwen3_moe",
        "smollm3",
    ]
)
"""Families of ours that liger-kernel knows (transformers/monkey_patch.py, ``MODEL_TYPE_TO_APPLY_LIGER_FN``)."""


def rows_at_once(num_tokens: int, vocab_size: int, hidden_size: int) -> int:
    """Tokens of one chunk: as many as make logits about as large as the hidden states, up to a power of two."""
    wanted = -(-num_tokens // -(-vocab_size // hidden_size))
    return min(num_tokens, 1 << (wanted - 1).bit_length())


def fused_loss(ctx: BlockContext, x: Tensor, architecture: Architecture, rows: int) -> Tensor:
    """``LigerForCausalLMLoss`` on the normed hidden states."""
    padded, targets = (ctx.tape.new(tokens(1), Dtype.INT64, TOKENS) for _ in range(2))
    weight = head_weight(ctx, architecture)
    out = ctx.call(
        architecture.head.name, (weight,), lambda x: _kernel(ctx, x, weight, rows, architecture), ops.view(x)
    )
    del padded, targets
    return out


def _lowered_chunks(ctx: BlockContext, weight: Parameter, hidden: Size, vocab: Size, low: Dtype) -> None:
    """The first two chunks under autocast: of the weight's transposed view a copy is made each time, of a trained
    weight itself one that autocast keeps (``cached_cast``); the weight's gradient takes the chunk in low precision
    (compute capability 8.0)."""
    tape = ctx.tape
    for _ in range(2):
        chunk, transposed = tape.new(hidden, low, LOSS), tape.new(weight.numel, low, LOSS)
        logits = tape.new(vocab, low, LOGITS)
        del chunk, transposed
        with tape.without_graph():
            copy = cast_of_weight(ctx, weight)
        product = tape.new(hidden, low, LOSS)
        del product, logits, copy


def _kernel(ctx: BlockContext, x: Tensor, weight: Parameter, rows: int, architecture: Architecture) -> Tensor:
    tape = x.storage.tape
    grad_x = tape.new(x.numel, x.dtype, LOSS)
    grad_weight = tape.new(weight.numel, weight.dtype, LOSS) if weight.requires_grad else None
    losses, mask = tape.new(tokens(1), Dtype.FP32, LOSS), tape.new(tokens(1), Dtype.BOOL, LOSS)
    hidden, vocab = const(rows * architecture.hidden_size), const(rows * architecture.vocab_size)
    if ctx.autocast in (None, x.dtype):
        logits = tape.new(vocab, x.dtype, LOGITS)
        del logits
    else:
        _lowered_chunks(ctx, weight, hidden, vocab, ctx.autocast)
    out = tape.new(const(1), Dtype.FP32, LOSS)
    del losses, mask

    def backward(node: Node, grads: list[Tensor | None]) -> list[Tensor | None]:
        kept = [node.unpack(index) for index in range(len(node.saved))]
        handed: list[Tensor | None] = [Tensor(each.storage, each.numel, each.dtype) for each in kept]
        return handed if len(handed) == 2 else [*handed, None]

    saved = [grad_x] if grad_weight is None else [grad_x, grad_weight]
    return tape.attach("fused loss", out, [x, weight], saved, backward)
