"""Scaled dot-product attention as a CUDA build of torch runs it: which kernel is chosen, and what it keeps.

The choice is made in C++ for real CUDA tensors only, so it is made here again (sdp_utils.cpp, ``select_sdp_backend``);
the operators called are the CUDA ones, whose shapes torch knows for fake tensors.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch

aten = torch.ops.aten

FLASH_MAX_HEAD_DIM = 256
"""check_head_dim_size_flash"""
FLASH_NAME = "vramplan_fa2"
"""What ``flash_attention_2`` is called in a simulation, where the package is not needed."""
_HALF = (torch.float16, torch.bfloat16)


def cuda_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """``torch.nn.functional.scaled_dot_product_attention`` on CUDA. Shapes (batch, heads, tokens, width)."""
    if _flash_can(query, key, value, attn_mask, enable_gqa):
        return _flash(query, key, value, dropout_p, is_causal, scale)
    if enable_gqa and key.shape[-3] != query.shape[-3]:
        repeats = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(repeats, -3), value.repeat_interleave(repeats, -3)
    elif _efficient_can(query, key, value):
        bias = _float_mask(attn_mask, query, key)
        needs_lse = any(tensor.requires_grad for tensor in (query, key, value))
        output: torch.Tensor = aten._scaled_dot_product_efficient_attention(
            query, key, value, bias, needs_lse, dropout_p, is_causal, scale=scale
        )[0]
        return output
    exact: torch.Tensor = aten._scaled_dot_product_attention_math(
        query, key, value, _float_mask(attn_mask, query, key, aligned=False), dropout_p, is_causal, scale=scale
    )[0]
    return exact


def register_flash(*, padded: bool = True) -> str:
    """Gives transformers an attention that keeps what the package flash-attn keeps; its name there.

    flash-attn saves queries, keys, values, the result, row sums and a random state, as torch's own flash kernel does;
    with padding, transformers copies queries, keys and values without it and the result back (``_upad_input``).
    ``padded``: whether a mask that is passed hides something.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(FLASH_NAME, _flash_attention_2)
    AttentionMaskInterface.register(FLASH_NAME, _mask_of_padding if padded else _no_mask)
    return FLASH_NAME


@contextmanager
def flash_in_class_tables(model_type: str) -> Iterator[None]:
    """The same for a model whose code has a class for each attention (``FALCON_ATTENTION_CLASSES``), which calls the
    package by ``_flash_attention_forward``."""
    try:
        module = importlib.import_module(f"transformers.models.{model_type}.modeling_{model_type}")
    except ImportError:  # comes with the model, or shares another type's file
        yield
        return
    with ExitStack() as stack:
        for name, table in list(vars(module).items()):
            if name.endswith("ATTENTION_CLASSES") and "flash_attention_2" in table:
                stack.enter_context(mock.patch.dict(table, {FLASH_NAME: table["flash_attention_2"]}))
                stack.enter_context(mock.patch.object(module, "flash_attn_supports_top_left_mask", return_value=False))
                forward = mock.patch.object(module, "_flash_attention_forward", _flash_attention_forward, create=True)
                stack.enter_context(forward)  # imported there only where the package is
        yield


def _flash_attention_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    query_length: int,
    dropout: float = 0.0,
    softmax_scale: float | None = None,
    **_: Any,
) -> torch.Tensor:
    """transformers' function of that name (modeling_flash_attention_utils.py). Shapes (batch, tokens, heads, width)."""
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return _flash_attention_2(torch.nn.Identity(), query, key, value, attention_mask, dropout, softmax_scale)[0]


def _mask_of_padding(*, attention_mask: torch.Tensor | None, kv_length: int, **_: Any) -> torch.Tensor | None:
    """``flash_attention_mask`` of transformers' masking_utils.py where a token is padding."""
    return None if attention_mask is None else attention_mask[:, -kv_length:]


def _no_mask(**_: Any) -> None:
    """The same where every token is real."""


def _flash_attention_2(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' ``flash_attention_forward``; the result is (batch, tokens, heads, width). Values that are narrower
    than queries are padded for the kernel, and its result is cut (integrations/flash_attention.py:60 and :99)."""
    value_width = value.shape[-1]
    if value_width != query.shape[-1]:
        value = torch.nn.functional.pad(value, [0, query.shape[-1] - value_width])
    if query.dtype is torch.float32:  # autocast or adapters left it wide: cast to the weights' compute dtype
        query, key, value = (tensor.to(torch.bfloat16) for tensor in (query, key, value))
    if attention_mask is not None:
        query, key, value = (tensor.clone() for tensor in (query, key, value))
    output = _flash(query, key, value, dropout, True, scaling).transpose(1, 2)
    return (output if attention_mask is None else output.clone())[..., :value_width], None


def _flash_can(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None, enable_gqa: bool
) -> bool:
    """use_flash_attention: half precision, no mask, one head width up to 256, and as many heads unless GQA is said."""
    return (
        attn_mask is None
        and query.dtype in _HALF
        and query.shape[-1] == key.shape[-1] == value.shape[-1] <= FLASH_MAX_HEAD_DIM
        and (enable_gqa or query.shape[-3] == key.shape[-3] == value.shape[-3])
    )


def _flash(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropout_p: float, is_causal: bool, scale: float | None
) -> torch.Tensor:
    """Head widths that are no multiple of 8 are padded first (pad_last_dim) and cut afterwards."""
    width = query.shape[-1]
    scale = scale if scale is not None else 1 / math.sqrt(width)
    padding = -width % 8
    if padding:
        query, key, value = (torch.nn.functional.pad(tensor, (0, padding)) for tensor in (query, key, value))
    output: torch.Tensor = aten._scaled_dot_product_flash_attention(
        query, key, value, dropout_p, is_causal, False, scale=scale
    )[0]
    return output[..., :width] if padding else output


def _efficient_can(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """use_mem_efficient_attention: as many heads everywhere, and widths that its loads are aligned for."""
    alignment = 8 if query.dtype in _HALF else 4
    return query.shape[-3] == key.shape[-3] and query.shape[-1] % alignment == 0 and value.shape[-1] % alignment == 0


def _float_mask(
    mask: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor, *, aligned: bool = True
) -> torch.Tensor | None:
    """A bool mask becomes 0 and minus infinity (convert_boolean_attn_mask); the memory-efficient kernel wants rows of
    a multiple of 16 (pad_bias) and one mask a head (expanded, not copied)."""
    if mask is None:
        return None
    if mask.dtype is torch.bool:
        mask = torch.zeros(mask.shape, dtype=query.dtype, device=query.device)
    if not aligned:
        return mask
    padding = -mask.shape[-1] % 16
    if padding:
        mask = torch.nn.functional.pad(mask, (0, padding))[..., : mask.shape[-1]]
    return mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
