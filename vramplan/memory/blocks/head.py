"""The two ends of the model: embeddings, and the head with its loss."""

from __future__ import annotations

from collections.abc import Callable

from vramplan.facts.architecture import Architecture, Embedding
from vramplan.facts.dtype import Dtype
from vramplan.memory import ops
from vramplan.memory.blocks.context import BlockContext, tokens
from vramplan.memory.blocks.layer import RESIDUAL
from vramplan.memory.blocks.linear import project
from vramplan.memory.size import Size, per_position
from vramplan.memory.tape import Tensor

LOGITS = "logits"
LOSS = "loss"
TOKENS = "token ids and labels"


def embed(
    ctx: BlockContext,
    architecture: Architecture,
    ids: Tensor,
    on_tokens: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Token embeddings, plus learned positions where the family has them (``GPT2Model.forward``).

    ``on_tokens``: a forward hook of the token table, which runs before ZeRO-3's own.
    """
    first, *positions = architecture.embeddings
    x = _look_up(ctx, first, tokens(first.width), ids, on_tokens)
    for table in positions:
        at = _look_up(ctx, table, per_position(table.width), ids)
        x = ops.add_broadcast(x, at, RESIDUAL)
        del at
    return ops.dropout(x, architecture.embedding_dropout, ctx.device, RESIDUAL)


def _look_up(
    ctx: BlockContext,
    table: Embedding,
    numel: Size,
    ids: Tensor,
    hook: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    weight = ctx.parameter(f"{table.name}.weight", table.num_embeddings * table.width)

    def run(_: Tensor) -> Tensor:
        out = ops.embedding(ctx.tape, weight, numel, ctx.dtype, RESIDUAL)
        return hook(out) if hook is not None else out

    return ctx.call(table.name, (weight,), run, ids)


def logits(ctx: BlockContext, x: Tensor, architecture: Architecture) -> Tensor:
    """``lm_head(x)``; a tied head shares the embedding's parameter."""
    head = architecture.head
    if architecture.tied_embeddings:
        table = architecture.embeddings[0]
        weight = ctx.parameter(f"{table.name}.weight", table.num_embeddings * table.width)
        ctx.parameters[f"{head.name}.weight"] = weight
    return project(ctx, x, head, LOGITS)


def loss(ctx: BlockContext, scores: Tensor) -> Tensor:
    """``ForCausalLMLoss``: logits to fp32, log-softmax, negative log-likelihood (transformers/loss/loss_utils.py)."""
    wide = ops.view(ops.to(scores, Dtype.FP32, LOSS))
    padded = ctx.tape.new(tokens(1), Dtype.INT64, TOKENS)
    targets = ctx.tape.new(tokens(1), Dtype.INT64, TOKENS)
    log_probabilities = ops.log_softmax(wide, LOSS)
    result = ops.nll_loss(log_probabilities, targets, LOSS)
    del log_probabilities, wide, padded
    return result
