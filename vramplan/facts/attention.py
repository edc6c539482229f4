"""Which of transformers' attention implementations a family has (``_supports_sdpa``, ``_supports_flash_attn``)."""

from __future__ import annotations

_MISSING = {
    "bloom": ("sdpa", "flash_attention_2"),
    "gpt_oss": ("sdpa",),
    "llama4": ("flash_attention_2",),
}
"""By family: what its classes in transformers 5.17 refuse (models/*/modeling_*.py)."""


def has_attention(family: str, attention: str) -> bool:
    """Whether the family's code has it; eager is always there."""
    return attention not in _MISSING.get(family, ())
