"""The two ends of the model: embeddings, and the head with its loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from vramplan.facts.architecture import Architecture, Embedding
from vramplan.facts.dtype import Dtype
from vramplan.memory import ops
from vramplan.memory.blocks.context import BlockContext, tokens
from vramplan.memory.blocks.dora import dora_of_table
from vramplan.memory.blocks.layer import RESIDUAL
from vramplan.memory.blocks.linear import project
from vramplan.memory.blocks.norm import normalise
from vramplan.memory.leaf import Parameter
from vramplan.memory.size import Size
from vramplan.memory.tape import Tensor
from vramplan.spec.trainable import LoraMethod

LOGITS = "logits"
LOSS = "loss"
TOKENS = "token ids and labels"
ADAPTERS = "adapters"


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
    head_weight(ctx, architecture)
    scaled_inside = architecture.embedding_scaled and not architecture.scaled_outside

    def finish(out: Tensor) -> Tensor:
        out = ops.scaled(out, RESIDUAL) if scaled_inside else out
        return on_tokens(out) if on_tokens is not None else out

    method = ctx.adapts_table(first)
    if method is None:
        x = _look_up(ctx, first, tokens(first.width), ids, finish)
    else:
        x = _adapted_table(ctx, first, ids, method, scaled_inside, on_tokens)
    if architecture.scaled_outside:
        x = ops.scaled(x, RESIDUAL)
    for table in positions:
        at = _positions(ctx, table, ids)
        if architecture.embedding_projections:
            x = project(ctx, x, architecture.embedding_projections[-1], RESIDUAL)
        ctx.model_frame += [x, at]
        apart = table.each_sequence or ctx.given_positions
        x = ops.add(x, at, RESIDUAL) if apart else ops.add_broadcast(x, at, RESIDUAL)
    if architecture.embedding_norm is not None:
        ctx.model_frame.append(x)
        x = normalise(ctx, x, architecture.embedding_norm)
    elif architecture.holds_embedding and not positions:
        ctx.model_frame.append(x)
    x = ctx.dropout(x, architecture.embedding_dropout, RESIDUAL, architecture.embedding_dropout_module)
    if not architecture.holds_embedding:
        ctx.model_frame.append(x)
    return x


def _adapted_table(
    ctx: BlockContext,
    table: Embedding,
    ids: Tensor,
    method: LoraMethod,
    scaled: bool,
    on_tokens: Callable[[Tensor], Tensor] | None,
) -> Tensor:
    """The token table with PEFT's adapter (tuners/lora/layer.py, ``Embedding.forward``): a narrow table, its rows
    widened and added. ``scaled``: the table's module multiplies what it finds, and so the adapter does too."""
    down, up = table_factors(ctx, table, method)
    base = replace(table, name=f"{table.name}.base_layer")

    def run(ids: Tensor) -> Tensor:
        result = _look_up(ctx, base, tokens(table.width), ids, lambda out: ops.scaled(out, RESIDUAL) if scaled else out)
        given = result.dtype
        ctx.reads(down, up)
        # the dense gradient of the narrow table lies the other way round than the factor, so it is copied
        found = ops.embedding(ctx.tape, ops.to_heads(down), tokens(method.r), down.dtype, ADAPTERS)
        narrow, wide = ctx.all_low(ADAPTERS, found, ops.view(up))
        added = ops.scaled(ops.linear(narrow, wide, None, tokens(table.width), ADAPTERS), ADAPTERS)
        if scaled:
            added = ops.scaled(added, ADAPTERS)
        result = ops.to(ops.add(result, added, RESIDUAL), given, RESIDUAL)
        del found, added  # named until the function returns
        return on_tokens(result) if on_tokens is not None else result

    def run_dora(ids: Tensor) -> Tensor:
        result = _look_up(ctx, base, tokens(table.width), ids, lambda out: ops.scaled(out, RESIDUAL) if scaled else out)
        ctx.reads(down, up)
        result = ops.to(_directed(ctx, table, ids, method, result, scaled), result.dtype, RESIDUAL)
        return on_tokens(result) if on_tokens is not None else result

    return ctx.call(table.name, (), run_dora if method.use_dora else run, ids, read=(down, up))


def _directed(
    ctx: BlockContext, table: Embedding, ids: Tensor, method: LoraMethod, result: Tensor, scaled: bool
) -> Tensor:
    """``magnitude / norm * result`` and the adapter's part (peft/tuners/lora/variants.py, ``DoraEmbeddingVariant``)."""
    magnitude = ctx.parameter(f"{table.name}.lora_magnitude_vector.weight", table.width, True, ctx.adapter_dtype)
    weight, factors, scale = _table_weight(ctx, table), table_factors(ctx, table, method), list[Tensor]()

    def run(ids: Tensor) -> Tensor:
        quotient, added = dora_of_table(ctx, ids, table, weight, factors, magnitude, method)
        scale.append(quotient)
        return added

    added = ctx.call(f"{table.name}.lora_magnitude_vector", (magnitude,), run, ids, read=(weight,))
    if scaled:
        added = ops.scaled(added, ADAPTERS)
    return ops.add(ops.mul_broadcast(result, scale[0], RESIDUAL, small_first=True), added, RESIDUAL)


def _table_weight(ctx: BlockContext, table: Embedding) -> Parameter:
    return ctx.parameter(f"{table.name}.weight", table.num_embeddings * table.width)


def table_factors(ctx: BlockContext, table: Embedding, method: LoraMethod) -> tuple[Parameter, Parameter]:
    """The narrow table and the matrix that widens its rows."""
    return (
        ctx.parameter(f"{table.name}.lora_embedding_A", method.r * table.num_embeddings, True, ctx.adapter_dtype),
        ctx.parameter(f"{table.name}.lora_embedding_B", method.r * table.width, True, ctx.adapter_dtype),
    )


def _positions(ctx: BlockContext, table: Embedding, ids: Tensor) -> Tensor:
    """Learned positions; OPT counts them along a mask of ones."""
    if table.each_sequence:
        ctx.model_frame += [ctx.tape.new(tokens(1), Dtype.FP32, TOKENS), ctx.tape.new(tokens(1), Dtype.INT64, TOKENS)]
    numel = tokens(table.width) if table.each_sequence else ctx.at_positions(table.width)
    return _look_up(ctx, table, numel, ids, lambda out: out)


def _look_up(
    ctx: BlockContext, table: Embedding, numel: Size, ids: Tensor, finish: Callable[[Tensor], Tensor]
) -> Tensor:
    name = table.name.removesuffix(".base_layer")  # a tied head shares it
    weight = _table_weight(ctx, replace(table, name=name))
    return ctx.call(
        table.name, (weight,), lambda _: finish(ops.embedding(ctx.tape, weight, numel, ctx.dtype, RESIDUAL)), ids
    )


def head_weight(ctx: BlockContext, architecture: Architecture) -> Parameter:
    """The head's weight; a tied one is the token table's, which DeepSpeed marks as a linear's for the head's sake."""
    head = architecture.head
    if not architecture.tied_embeddings:
        return ctx.linear_parameters(head)[0]
    table = architecture.embeddings[0]
    weight = ctx.parameter(f"{table.name}.weight", table.num_embeddings * table.width)
    weight.lowered = head.is_nn_linear
    return weight


def logits(ctx: BlockContext, x: Tensor, architecture: Architecture) -> Tensor:
    """``lm_head(x)``; a tied head shares the embedding's parameter."""
    head = architecture.head
    if architecture.tied_embeddings:
        ctx.parameters[f"{head.name}.weight"] = head_weight(ctx, architecture)
    scores = project(ctx, x, head, LOGITS)
    if head.out_features != architecture.vocab_size:
        scores = _gathered(scores, tokens(architecture.vocab_size))
    if architecture.logits_softcap:
        scores = ops.scaled(scores, LOGITS)
        scores = ops.unary(scores, LOGITS, "result")
        scores = ops.scaled(scores, LOGITS)
    return ops.scaled(scores, LOGITS) if architecture.logits_scaled else scores


def _gathered(part: Tensor, whole: Size) -> Tensor:
    """Logits of every rank's share of the vocabulary (``GatherFromTensorParallelRegion``): gathered, then joined."""
    tape, numel, dtype = part.storage.tape, part.numel, part.dtype
    buffer = tape.new(whole, dtype, LOGITS)
    out = tape.new(whole, dtype, LOGITS)
    del buffer
    return tape.attach("gather", out, [part], [], lambda node, grads: [tape.new(numel, dtype, ops.GRADIENTS)])


def loss(ctx: BlockContext, scores: Tensor, shifts_logits: bool = False) -> Tensor:
    """``ForCausalLMLoss``: logits to fp32, log-softmax, negative log-likelihood (transformers/loss/loss_utils.py).

    ``shifts_logits``: all but the last position are copied first, as transformers up to 4.48 did (one position a
    sequence more is counted).
    """
    given = ops.to(scores, Dtype.FP32, LOSS)
    wide = ops.view(ops.clone(ops.piece(given, given.numel), LOSS) if shifts_logits else given)
    padded = ctx.tape.new(tokens(1), Dtype.INT64, TOKENS)
    targets = ctx.tape.new(tokens(1), Dtype.INT64, TOKENS)
    log_probabilities = ops.log_softmax(wide, LOSS)
    result = ops.nll_loss(log_probabilities, targets, LOSS)
    del log_probabilities, wide, given, padded
    return result
