"""Qwen1.5, Qwen2 and Qwen2.5: ``models/qwen2/configuration_qwen2.py`` of transformers 5.17."""

from __future__ import annotations

from vramplan.facts.architecture import Architecture, Attention, DecoderLayer
from vramplan.facts.families.fields import Fields
from vramplan.facts.families.parts import (
    decoder,
    gated_mlp,
    one_per_kind,
    read_heads,
    rms_pair,
    sliding_layers,
    split_projections,
)


def build(fields: Fields) -> Architecture:
    """Llama's blocks with biases on query, key and value (never on the output projection)."""
    heads = read_heads(fields, default_kv_heads=32)
    num_layers = fields.required_size("num_hidden_layers")
    projections = split_projections(heads, qkv_bias=True)
    dropout = fields.fraction("attention_dropout", default=0.0)
    mlp = gated_mlp(
        heads.hidden_size, fields.required_size("intermediate_size"), fields.text("hidden_act", default="silu")
    )
    norms = rms_pair(heads.hidden_size)

    def layer(window: int | None) -> DecoderLayer:
        attention = Attention(
            heads.num_heads,
            heads.num_kv_heads,
            heads.head_dim,
            projections,
            sliding_window=window,
            dropout=dropout,
            rotary_dim=heads.head_dim,
        )
        return DecoderLayer((attention, mlp, *norms))

    layers = one_per_kind(sliding_layers(fields, num_layers), layer)
    return decoder(fields, layers, hidden=heads.hidden_size, default_positions=32_768, default_tied=False)
