"""Gemma: ``models/gemma/configuration_gemma.py`` of transformers 5.17."""

from __future__ import annotations

from dataclasses import replace

from vramplan.facts.architecture import Architecture, DecoderLayer, Norm
from vramplan.facts.families.fields import Fields
from vramplan.facts.families.parts import attention, decoder, gated_mlp, norm_pair, read_heads, split_projections


def build(fields: Fields) -> Architecture:
    """Llama's blocks with wide heads, GELU gates, ``1 + weight`` norms and scaled embeddings."""
    heads = read_heads(fields, default_kv_heads=16, head_dim=256)
    hidden = heads.hidden_size
    bias = fields.flag("attention_bias", default=False)
    mixer = attention(fields, heads, split_projections(heads, qkv_bias=bias, out_bias=bias))
    activation = fields.text("hidden_act", default="gelu_pytorch_tanh")
    mlp = gated_mlp(hidden, fields.required_size("intermediate_size"), activation)
    layers = (DecoderLayer((mixer, mlp, *norm_pair(hidden, "rms_gemma"))),) * fields.required_size("num_hidden_layers")
    final_norm = Norm("model.norm", hidden, "rms_gemma")
    frame = decoder(fields, layers, hidden=hidden, default_positions=8192, default_tied=True, final_norm=final_norm)
    return replace(frame, embedding_scaled=True)
