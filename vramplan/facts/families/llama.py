"""Llama and everything that shares its class: ``models/llama/configuration_llama.py`` of transformers 5.17."""

from __future__ import annotations

from vramplan.facts.architecture import Architecture, DecoderLayer
from vramplan.facts.families.fields import Fields
from vramplan.facts.families.parts import (
    attention,
    decoder,
    norm_pair,
    read_heads,
    split_projections,
    standard_mlp,
    whole_multiple,
)


def build(fields: Fields) -> Architecture:
    """Pre-norm RMS, rotary grouped-query attention, SiLU-gated MLP."""
    heads = read_heads(fields, default_kv_heads=None)
    whole_multiple(fields, heads.hidden_size, heads.num_heads)  # LlamaConfig asks it whatever head_dim says
    bias = fields.flag("attention_bias", default=False)
    mixer = attention(fields, heads, split_projections(heads, qkv_bias=bias, out_bias=bias))
    mlp = standard_mlp(fields, heads.hidden_size, bias=fields.flag("mlp_bias", default=False))
    layer = DecoderLayer((mixer, mlp, *norm_pair(heads.hidden_size)))
    layers = (layer,) * fields.required_size("num_hidden_layers")
    return decoder(fields, layers, hidden=heads.hidden_size, default_positions=2048, default_tied=False)
