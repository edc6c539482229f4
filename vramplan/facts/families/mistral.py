"""Mistral: ``models/mistral/configuration_mistral.py`` of transformers 5.17."""

from __future__ import annotations

from dataclasses import replace

from vramplan.facts.architecture import Architecture, DecoderLayer
from vramplan.facts.families.fields import Fields
from vramplan.facts.families.parts import (
    attention,
    decoder,
    norm_pair,
    read_heads,
    split_projections,
    standard_mlp,
)


def build(fields: Fields) -> Architecture:
    """Llama's blocks without biases, with a sliding window over every layer where the config has one."""
    heads = read_heads(fields, default_kv_heads=8)
    window = fields.optional_size("sliding_window", default=4096)
    mixer = replace(attention(fields, heads, split_projections(heads)), sliding_window=window)
    layer = DecoderLayer((mixer, standard_mlp(fields, heads.hidden_size), *norm_pair(heads.hidden_size)))
    layers = (layer,) * fields.required_size("num_hidden_layers")
    return decoder(fields, layers, hidden=heads.hidden_size, default_positions=131_072, default_tied=False)
