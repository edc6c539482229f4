"""SmolLM3: ``models/smollm3/configuration_smollm3.py`` of transformers 5.17."""

from __future__ import annotations

from dataclasses import replace

from vramplan.facts.architecture import Architecture, DecoderLayer
from vramplan.facts.families.fields import Fields
from vramplan.facts.families.parts import (
    attention,
    decoder,
    norm_pair,
    one_per_kind,
    read_heads,
    rotated_layers,
    split_projections,
    standard_mlp,
    windows,
)


def build(fields: Fields) -> Architecture:
    """Llama's blocks; every fourth layer has no rotary positions (and slides, if sliding is on)."""
    heads = read_heads(fields, default_kv_heads=4)
    hidden = heads.hidden_size
    bias = fields.flag("attention_bias", default=False)
    mixer = attention(fields, heads, split_projections(heads, qkv_bias=bias, out_bias=bias))
    mlp = standard_mlp(fields, hidden, bias=fields.flag("mlp_bias", default=False))
    rotated = rotated_layers(fields, fields.required_size("num_hidden_layers"))

    def layer(kind: tuple[bool, int | None]) -> DecoderLayer:
        is_rotated, window = kind
        rotary_dim = heads.head_dim if is_rotated else 0
        return DecoderLayer((replace(mixer, rotary_dim=rotary_dim, sliding_window=window), mlp, *norm_pair(hidden)))

    sliding = _windows(fields, rotated)
    layers = one_per_kind(tuple(zip(rotated, sliding, strict=True)), layer)
    model = decoder(fields, layers, hidden=hidden, default_positions=32_768, default_tied=True)
    return replace(model, both_masks=any(sliding))


def _windows(fields: Fields, rotated: tuple[bool, ...]) -> tuple[int | None, ...]:
    if not fields.flag("use_sliding_window", default=False):
        return (None,) * len(rotated)
    kinds = ["full_attention" if it else "sliding_attention" for it in rotated]
    return windows(fields, kinds, default_window=None)
