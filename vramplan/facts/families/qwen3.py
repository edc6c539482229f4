"""Qwen3 (dense): ``models/qwen3/configuration_qwen3.py`` of transformers 5.17."""

from __future__ import annotations

from dataclasses import replace

from vramplan.facts.architecture import Architecture, DecoderLayer, Norm
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
    """Llama's blocks with an RMS norm over each query and key head."""
    heads = read_heads(fields, default_kv_heads=32, head_dim=128)
    bias = fields.flag("attention_bias", default=False)
    mixer = replace(
        attention(fields, heads, split_projections(heads, qkv_bias=bias, out_bias=bias)),
        normed_at_once=True,
        q_norm=Norm("self_attn.q_norm", heads.head_dim),
        k_norm=Norm("self_attn.k_norm", heads.head_dim),
    )
    rest = (standard_mlp(fields, heads.hidden_size), *norm_pair(heads.hidden_size))
    windows = sliding_layers(fields, fields.required_size("num_hidden_layers"))
    layers = one_per_kind(windows, lambda window: DecoderLayer((replace(mixer, sliding_window=window), *rest)))
    model = decoder(fields, layers, hidden=heads.hidden_size, default_positions=32_768, default_tied=False)
    return replace(model, both_masks=any(windows))
