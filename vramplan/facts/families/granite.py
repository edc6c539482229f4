"""Granite: ``models/granite/configuration_granite.py`` of transformers 5.17."""

from __future__ import annotations

from dataclasses import replace

from vramplan.facts.architecture import Architecture, DecoderLayer
from vramplan.facts.families.fields import Fields
from vramplan.facts.families.parts import attention, decoder, norm_pair, read_heads, split_projections, standard_mlp


def build(fields: Fields) -> Architecture:
    """Llama's blocks with constants on embeddings, branches and logits (multiplied even where they are 1)."""
    heads = read_heads(fields, default_kv_heads=None)
    hidden = heads.hidden_size
    bias = fields.flag("attention_bias", default=False)
    mixer = attention(fields, heads, split_projections(heads, qkv_bias=bias, out_bias=bias))
    mlp = standard_mlp(fields, hidden, bias=fields.flag("mlp_bias", default=False))
    layer = DecoderLayer((mixer, mlp, *norm_pair(hidden)), residual_scaled=True)
    layers = (layer,) * fields.required_size("num_hidden_layers")
    frame = decoder(fields, layers, hidden=hidden, default_positions=2048, default_tied=False)
    return replace(frame, embedding_scaled=True, scaled_outside=True, logits_scaled=True)
