"""Scores and values: eager operators, a fused kernel, or the unfused path that the kernel falls back to."""

from __future__ import annotations

from vramplan.facts.architecture import Attention, LatentAttention
from vramplan.facts.dtype import Dtype
from vramplan.memory import ops
from vramplan.memory.blocks.context import BlockContext, tokens
from vramplan.memory.blocks.rotary import CORE
from vramplan.memory.blocks.sinks import sink_weights, weighed
from vramplan.memory.size import ZERO, Size, per_mask, per_score, per_token
from vramplan.memory.tape import Tensor

MASK = "causal mask"
Mixer = Attention | LatentAttention


def masks(ctx: BlockContext, attentions: list[Mixer], spare: bool = False, both: bool = False) -> None:
    """One mask for all layers that see everything and one for those that slide (transformers/masking_utils.py).

    Eager attention adds them; fused kernels are told that the mask is causal unless sequences reach the window, or
    are padded or packed.
    Falcon always has one, which ALiBi's bias is part of. ``spare``, ``both``: see ``Architecture``.
    """
    has_whole = both or any(block.local_window is None for block in attentions)
    has_window = spare or both or any(block.local_window is not None for block in attentions)
    is_falcon = any(block.core == "falcon" for block in attentions)
    tables = ctx.tables
    if ctx.attention == "eager":
        if has_whole:
            tables.mask = ctx.tape.new(per_score(1), ctx.dtype, MASK)
        if has_window:
            tables.window_mask = ctx.tape.new(per_score(1), ctx.dtype, MASK)
    elif ctx.attention == "sdpa" and is_falcon:
        tables.mask = ctx.tape.new(per_score(1) if ctx.masked else per_mask(1), Dtype.BOOL, MASK)
    elif ctx.attention == "sdpa" and ctx.masked:
        if has_whole:
            tables.mask = ctx.tape.new(per_score(1), Dtype.BOOL, MASK)
        if has_window:
            tables.window_mask = ctx.tape.new(per_score(1), Dtype.BOOL, MASK)
    elif ctx.attention == "sdpa" and has_window and (ctx.windowed or spare):
        tables.window_mask = ctx.tape.new(per_mask(1), Dtype.BOOL, MASK)
    if attentions[0].alibi:
        _alibi(ctx, attentions[0].num_heads, is_falcon)


def _alibi(ctx: BlockContext, num_heads: int, is_falcon: bool) -> None:
    """``build_alibi_tensor``, from the padding mask or one of ones; Falcon merges it with the causal mask."""
    if not ctx.masked:
        ctx.model_frame.append(ctx.tape.new(tokens(1), Dtype.INT64 if is_falcon else Dtype.FP32, MASK))
    ctx.model_frame.append(ctx.tape.new(tokens(num_heads), ctx.dtype, MASK))
    if is_falcon:
        ctx.tables.mask = ctx.tape.new(per_score(num_heads), ctx.dtype, MASK)


def attention_core(ctx: BlockContext, q: Tensor, k: Tensor, v: Tensor, block: Mixer) -> Tensor:
    """Softmax attention of rotated queries and keys with values."""
    if ctx.attention == "eager":
        return _eager(ctx, q, k, v, block)
    if ctx.sequence_parallel > 1:  # Ulysses drops masks (ulysses_sp.py, uattn_wrapper): they hide its rank's part only
        return fused_core(ctx, q, k, v, block, None)
    if ctx.attention == "flash_attention_2" and ctx.masked:
        return without_padding(ctx, q, k, v, block)
    mask = ctx.tables.window_mask if block.local_window is not None else ctx.tables.mask
    if mask is not None:
        k, v = to_all_heads(k, block), to_all_heads(v, block)
    return fused_core(ctx, q, k, v, block, mask)


def without_padding(ctx: BlockContext, q: Tensor, k: Tensor, v: Tensor, block: Mixer) -> Tensor:
    """flash-attn on padded sequences: what is no padding (here all, at most) is copied out and the result back
    (modeling_flash_attention_utils.py, ``_upad_input``)."""
    q, k, v = (ops.clone(ctx.low(part, CORE), CORE) for part in (q, k, v))
    return ops.clone(fused_core(ctx, q, k, v, block, None), CORE)


def fused_core(ctx: BlockContext, q: Tensor, k: Tensor, v: Tensor, block: Mixer, mask: Tensor | None) -> Tensor:
    """``scaled_dot_product_attention``: one kernel, but for dropout on the CPU."""
    dropout = block.dropout if ctx.tape.training else 0.0
    if ctx.device == "cpu" and (dropout > 0.0 or block.out_width != block.q_width):
        return math_core(ctx, q, k, v, block, mask)
    q, k, v = _as_the_kernel_casts(ctx, q, k, v)
    scratch, efficient = ZERO, False
    if ctx.device == "cuda" and mask is None and q.dtype is not Dtype.FP32:
        scratch = _flash_scratch(block, grouped=k.numel != q.numel)
    elif ctx.device == "cuda":
        if k.numel != q.numel:  # told of grouped heads, which only FlashAttention takes
            return math_core(ctx, q, k, v, block, mask)
        scratch, efficient = _efficient_scratch(block), True
    if mask is not None:
        mask = _numbers(ctx, mask, q.dtype)
    lse = per_token(block.num_heads)
    if block.out_width != block.q_width:
        return _of_two_widths(ctx, q, k, v, block, scratch, mask)
    out = ops.flash_attention(q, k, v, lse, CORE, scratch, mask)
    del q, k, v  # autocast's copies go when the kernel returns
    if ctx.sequence_parallel > 1 or efficient or not joined(block):
        return out  # the memory-efficient kernel lays positions before heads whatever the query's order
    return ops.clone(out, CORE)  # the result lies in memory as the query does, whose heads come before positions


def _as_the_kernel_casts(ctx: BlockContext, *parts: Tensor) -> list[Tensor]:
    """Autocast casts for ``scaled_dot_product_attention``; for flash-attn transformers casts one after the other
    (modeling_flash_attention_utils.py, ``fa_peft_integration_check``)."""
    if ctx.attention == "flash_attention_2":
        return [ctx.low(part, CORE) for part in parts]
    return ctx.all_low(CORE, *parts)


def _of_two_widths(
    ctx: BlockContext, q: Tensor, k: Tensor, v: Tensor, block: Mixer, scratch: Size, mask: Tensor | None
) -> Tensor:
    """Values narrower or wider than queries. ``flash_attention_2`` widens them with zeros and cuts the result
    (transformers/integrations/flash_attention.py, ``flash_attention_forward``); ``sdpa`` takes the memory-efficient
    kernel, whose backward sums the queries' gradient in fp32 too (attention_backward.cu, ``workspace_size``) and whose
    result lies with positions before heads."""
    lse, narrow = per_token(block.num_heads), tokens(block.out_width)
    if ctx.attention != "flash_attention_2":
        return ops.flash_attention(q, k, v, lse, CORE, _efficient_scratch(block), mask, narrow)
    v = ops.spread(v, q.numel, CORE)
    out = ops.flash_attention(q, k, v, lse, CORE, scratch, mask)
    return ops.clone(ops.piece(out, narrow), CORE)


def _flash_scratch(block: Mixer, grouped: bool) -> Size:
    """What FlashAttention-2's backward makes besides gradients, in elements of fp32: dq summed in fp32, with widths
    rounded up to 32 (64 above 128), a row sum a query and head, and with grouped heads dk and dv of every head
    (flash_api.cpp, mha_bwd: dq_accum, softmax_d, dk_expanded).

    ``grouped``: whether the kernel is given fewer heads of keys than of queries (Falcon-40B copies them to all)."""
    width = block.q_width // block.num_heads
    step = 32 if width <= 128 else 64
    rounded = -(-width // step) * step
    expanded = block.q_width if grouped else 0  # two of half an element each
    return per_token(block.num_heads * rounded + block.num_heads + expanded)


def _efficient_scratch(block: Mixer) -> Size:
    """What the memory-efficient kernel's backward makes besides gradients, in elements of fp32: a row sum a query and
    head, and dq summed in tiles of 64 columns (attention_backward.cu; kernel_backward.h, ``workspace_elements_gq``)."""
    width = block.q_width // block.num_heads
    return per_token(block.num_heads * (-(-width // 64) * 64 + 1))


def joined(block: Mixer) -> bool:
    """Whether queries and keys come out of a join, heads before positions in memory, and not as views of a
    projection (operators on one tensor keep its order, ``torch.cat`` does not)."""
    sliced = ("sliced", "named_slices", "paired", "halves")
    return isinstance(block, LatentAttention) or block.rotary in sliced


def whole_heads(ctx: BlockContext, x: Tensor, between: bool = True) -> Tensor:
    """Heads of several sequences as ``torch.matmul`` wants them: a copy, if they lie between positions in memory."""
    return x if ctx.lone_sequence or not between else ops.clone(x, CORE)


def one_to_all(ctx: BlockContext, x: Tensor, numel: Size) -> Tensor:
    """The one key/value head of all queries: a copy for each as soon as sequences are several."""
    return ops.spread(x, numel, CORE, copied=not ctx.lone_sequence)


def to_all_heads(x: Tensor, block: Mixer, copied: bool | None = None) -> Tensor:
    """``repeat_kv``: a copy, unless there is one head, of which all are a view; or as ``copied`` says."""
    if block.num_heads == block.num_kv_heads:
        return x
    return ops.spread(x, tokens(block.q_width), CORE, copied=block.num_kv_heads > 1 if copied is None else copied)


def _eager(ctx: BlockContext, q: Tensor, k: Tensor, v: Tensor, block: Mixer) -> Tensor:
    """``eager_attention_forward``: repeated heads, scores, fp32 softmax, dropout, values."""
    wide, repeated = tokens(block.out_width), block.num_heads > block.num_kv_heads > 1
    keys = to_all_heads(k, block)
    values = to_all_heads(v, block)
    weights = ops.scaled(_scores(ctx, q, keys, block, repeated), CORE)
    if block.softcap:
        weights = ops.scaled(weights, CORE)
        weights = ops.unary(weights, CORE, "result")
        weights = ops.scaled(weights, CORE)
    mask = ctx.tables.mask if block.local_window is None else ctx.tables.window_mask
    assert mask is not None
    weights = ops.masked(weights, mask, CORE)
    if isinstance(block, Attention) and block.sinks:
        weights = ops.dropout(sink_weights(ctx, weights, block), block.dropout, ctx.device, CORE)
        weights = ctx.returned = ops.to(weights, values.dtype, CORE)
        return ops.clone(weighed(ctx, weights, values, wide), CORE)
    low = q.dtype
    named, weights = [weights], ops.softmax(weights, _softmax_dtype(ctx, weights, block), ctx.device, CORE)
    if not block.softmax_fp32:
        named.clear()  # softmax and cast are two statements (GPT-2); as one they leave the scores their name
    weights = ops.to(weights, low, CORE) if block.casts_softmax else weights
    named.clear()
    weights = ops.dropout(weights, block.dropout, ctx.device, CORE)
    ctx.returned = weights
    cast = ctx.low(values, CORE)  # the name keeps what was cast, as keys', until the function returns
    out = ops.matmul(ctx.low(weights, CORE), cast if repeated else whole_heads(ctx, cast), wide, CORE)
    return ops.clone(out, CORE)


def _softmax_dtype(ctx: BlockContext, weights: Tensor, block: Mixer) -> Dtype:
    """What softmax is told to make, else the weights' own format, which CUDA's autocast widens (``softmax.int``)."""
    return Dtype.FP32 if block.softmax_fp32 or (ctx.autocast is not None and ctx.device == "cuda") else weights.dtype


def _scores(ctx: BlockContext, q: Tensor, keys: Tensor, block: Mixer, repeated: bool) -> Tensor:
    """``query @ key.transpose(2, 3)``."""
    q, keys = ctx.all_low(CORE, q, keys)
    if not joined(block):
        q = whole_heads(ctx, q)
    if not repeated and (not joined(block) or block.num_heads > block.num_kv_heads):
        keys = whole_heads(ctx, keys)
    return ops.matmul(q, keys, per_score(block.num_heads), CORE)


def _numbers(ctx: BlockContext, mask: Tensor, dtype: Dtype) -> Tensor:
    """The mask in the core's format (``convert_boolean_attn_mask``; autocast's copy of ALiBi's)."""
    numel = per_score(1) if mask.dtype is Dtype.BOOL else mask.numel
    return mask if mask.dtype is dtype else ctx.tape.new(numel, dtype, MASK)


def math_core(ctx: BlockContext, q: Tensor, k: Tensor, v: Tensor, block: Mixer, mask: Tensor | None = None) -> Tensor:
    """The unfused path of ``scaled_dot_product_attention``, taken on the CPU with dropout and for fewer heads of keys
    than of queries that the kernel is not told of: everything in fp32
    (``aten/src/ATen/native/transformers/attention.cpp``, ``_scaled_dot_product_attention_math``)."""
    q, k, v = ctx.all_low(CORE, q, k, v)
    source, scores, wide = q.dtype, per_score(block.num_heads), tokens(block.out_width)
    spread = k.numel != q.numel
    numbers = ctx.tape.new(per_mask(1), Dtype.FP32, MASK) if mask is None else _numbers(ctx, mask, source)
    wide_q, wide_k, wide_v = (ops.to(part, Dtype.FP32, CORE) for part in (q, k, v))
    apart = not joined(block)
    if spread and isinstance(block, Attention) and block.core != "falcon":  # told of (``enable_gqa``): repeated first
        wide_k, wide_v = to_all_heads(wide_k, block, True), to_all_heads(wide_v, block, True)
        spread, between = False, False
    else:
        between = apart
    scaled_q = ops.scaled(wide_q, CORE)
    scaled_k = ops.scaled(wide_k, CORE)
    keys = one_to_all(ctx, scaled_k, wide) if spread else whole_heads(ctx, scaled_k, between)
    del scaled_k
    weights = ops.matmul(whole_heads(ctx, scaled_q, apart), keys, scores, CORE)  # the numbers are added in place
    del keys
    weights = _safe_softmax(ctx, weights, scores)
    weights = ops.dropout(weights, block.dropout, ctx.device, CORE)
    low = ops.to(weights, source, CORE)
    values = one_to_all(ctx, wide_v, wide) if spread else whole_heads(ctx, wide_v, between or wide_v is v)
    out = ops.matmul(weights, values, wide, CORE)
    del low, numbers, values
    return ops.clone(ops.to(out, source, CORE), CORE)


def _safe_softmax(ctx: BlockContext, weights: Tensor, scores: Size) -> Tensor:
    """``_safe_softmax``: asks of every score whether it is minus infinity."""
    result = ops.softmax(weights, Dtype.FP32, ctx.device, CORE)
    asked = ctx.tape.new(scores, Dtype.BOOL, CORE)
    del asked
    return result
