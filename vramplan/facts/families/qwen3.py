"""Qwen3 (dense): ``models/qwen3/configuration_qwen3.py`` of transformers 5.17."""

from __future__ import annotations

from vramplan.facts.architecture import Architecture, Attention, DecoderLayer, Norm
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
    """Llama's blocks with an RMS norm over each query and key head."""
    heads = read_heads(fields, default_kv_heads=32, head_dim=128)
    num_layers = fields.required_size("num_hidden_layers")
    bias = fields.flag("attention_bias", default=False)
    projections = split_projections(heads, qkv_bias=bias, out_bias=bias)
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
            q_norm=Norm("self_attn.q_norm", heads.head_dim),
            k_norm=Norm("self_attn.k_norm", heads.head_dim),
            sliding_window=window,
            dropout=dropout,
            rotary_dim=heads.head_dim,
        )
        return DecoderLayer((attention, mlp, *norms))

    layers = one_per_kind(sliding_layers(fields, num_layers), layer)
    return decoder(fields, layers, hidden=heads.hidden_size, default_positions=32_768, default_tied=False)
