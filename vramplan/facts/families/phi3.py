"""Phi-3, Phi-3.5 and Phi-4: ``models/phi3/configuration_phi3.py`` of transformers 5.17."""

from __future__ import annotations

from dataclasses import replace

from vramplan.facts.architecture import Architecture, Attention, DecoderLayer, Linear, Role
from vramplan.facts.families.fields import Fields
from vramplan.facts.families.parts import Heads, attention, decoder, fused_gated_mlp, norm_pair, read_heads


def build(fields: Fields) -> Architecture:
    """Llama's arrangement with query/key/value in one linear and gate/up in another."""
    heads = read_heads(fields, default_kv_heads=None)
    hidden = heads.hidden_size
    intermediate = fields.required_size("intermediate_size")
    mlp = fused_gated_mlp(hidden, intermediate, fields.text("hidden_act", default="silu"))
    layer = DecoderLayer(
        (_attention(fields, heads), mlp, *norm_pair(hidden)),
        residual_dropout=fields.fraction("resid_pdrop", default=0.0),
        dropout_modules=("resid_attn_dropout", "resid_mlp_dropout"),
    )
    layers = (layer,) * fields.required_size("num_hidden_layers")
    return decoder(fields, layers, hidden=hidden, default_positions=4096, default_tied=False)


def _attention(fields: Fields, heads: Heads) -> Attention:
    q_width, kv_width = heads.num_heads * heads.head_dim, heads.num_kv_heads * heads.head_dim
    projections = (
        Linear("self_attn.qkv_proj", heads.hidden_size, q_width + 2 * kv_width, bias=False, role=Role.ATTENTION),
        Linear("self_attn.o_proj", q_width, heads.hidden_size, bias=False, role=Role.ATTENTION),
    )
    return replace(
        attention(fields, heads, projections),
        rotary_dim=int(heads.head_dim * fields.rotary_frac("partial_rotary_factor", default=1.0)),
        rotary="sliced",
        fused="slices",
        sliding_window=fields.optional_size("sliding_window", default=None),
        out_first=True,
    )
