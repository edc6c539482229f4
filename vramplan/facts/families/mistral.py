"""Mistral: ``models/mistral/configuration_mistral.py`` of transformers 5.17."""

from __future__ import annotations

from vramplan.facts.architecture import Architecture, Attention, DecoderLayer
from vramplan.facts.families.fields import Fields
from vramplan.facts.families.parts import decoder, gated_mlp, read_heads, rms_pair, split_projections


def build(fields: Fields) -> Architecture:
    """Llama's blocks without biases, with a sliding window over every layer where the config has one."""
    heads = read_heads(fields, default_kv_heads=8)
    attention = Attention(
        heads.num_heads,
        heads.num_kv_heads,
        heads.head_dim,
        split_projections(heads),
        sliding_window=fields.optional_size("sliding_window", default=4096),
        dropout=fields.fraction("attention_dropout", default=0.0),
        rotary_dim=heads.head_dim,
    )
    mlp = gated_mlp(
        heads.hidden_size, fields.required_size("intermediate_size"), fields.text("hidden_act", default="silu")
    )
    layer = DecoderLayer((attention, mlp, *rms_pair(heads.hidden_size)))
    layers = (layer,) * fields.required_size("num_hidden_layers")
    return decoder(fields, layers, hidden=heads.hidden_size, default_positions=131_072, default_tied=False)
