"""Llama and everything that shares its class: ``models/llama/configuration_llama.py`` of transformers 5.17."""

from __future__ import annotations

from vramplan.facts.architecture import Architecture, Attention, DecoderLayer
from vramplan.facts.families.fields import Fields
from vramplan.facts.families.parts import decoder, gated_mlp, read_heads, rms_pair, split_projections


def build(fields: Fields) -> Architecture:
    """Pre-norm RMS, rotary grouped-query attention, SiLU-gated MLP."""
    heads = read_heads(fields, default_kv_heads=None)
    if heads.hidden_size % heads.num_heads:  # LlamaConfig.validate_architecture, whatever head_dim says
        raise fields.error("hidden_size", f"is {heads.hidden_size}, no multiple of num_attention_heads")
    bias = fields.flag("attention_bias", default=False)
    attention = Attention(
        heads.num_heads,
        heads.num_kv_heads,
        heads.head_dim,
        split_projections(heads, qkv_bias=bias, out_bias=bias),
        dropout=fields.fraction("attention_dropout", default=0.0),
        rotary_dim=heads.head_dim,
    )
    mlp = gated_mlp(
        heads.hidden_size,
        fields.required_size("intermediate_size"),
        fields.text("hidden_act", default="silu"),
        bias=fields.flag("mlp_bias", default=False),
    )
    layer = DecoderLayer((attention, mlp, *rms_pair(heads.hidden_size)))
    layers = (layer,) * fields.required_size("num_hidden_layers")
    return decoder(fields, layers, hidden=heads.hidden_size, default_positions=2048, default_tied=False)
