"""GLM-4 (in transformers' own class): ``models/glm/configuration_glm.py`` of transformers 5.17."""

from __future__ import annotations

from dataclasses import replace

from vramplan.facts.architecture import Architecture, DecoderLayer
from vramplan.facts.families.fields import Fields
from vramplan.facts.families.parts import (
    attention,
    decoder,
    fused_gated_mlp,
    norm_pair,
    read_heads,
    split_projections,
)


def build(fields: Fields) -> Architecture:
    """Few key/value heads with biased projections, rotary on half of each head, gate and up in one linear."""
    heads = read_heads(fields, default_kv_heads=2, head_dim=128)
    hidden = heads.hidden_size
    mixer = replace(
        attention(fields, heads, split_projections(heads, qkv_bias=fields.flag("attention_bias", default=True))),
        rotary_dim=int(heads.head_dim * fields.rotary_frac("partial_rotary_factor", default=0.5)),
        rotary="paired",
    )
    intermediate = fields.required_size("intermediate_size")
    mlp = fused_gated_mlp(hidden, intermediate, fields.text("hidden_act", default="silu"))
    layers = (DecoderLayer((mixer, mlp, *norm_pair(hidden))),) * fields.required_size("num_hidden_layers")
    return decoder(fields, layers, hidden=hidden, default_positions=131_072, default_tied=False)
