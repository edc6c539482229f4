"""Qwen1.5, Qwen2 and Qwen2.5: ``models/qwen2/configuration_qwen2.py`` of transformers 5.17."""

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
    sliding_layers,
    split_projections,
    standard_mlp,
)


def build(fields: Fields) -> Architecture:
    """Llama's blocks with biases on query, key and value (never on the output projection)."""
    heads = read_heads(fields, default_kv_heads=32)
    mixer = attention(fields, heads, split_projections(heads, qkv_bias=True))
    rest = (standard_mlp(fields, heads.hidden_size), *norm_pair(heads.hidden_size))
    windows = sliding_layers(fields, fields.required_size("num_hidden_layers"))
    layers = one_per_kind(windows, lambda window: DecoderLayer((replace(mixer, sliding_window=window), *rest)))
    model = decoder(fields, layers, hidden=heads.hidden_size, default_positions=32_768, default_tied=False)
    return replace(model, both_masks=any(windows))
