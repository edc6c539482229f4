"""Command-R and Aya-23: ``models/cohere/configuration_cohere.py`` of transformers 5.17."""

from __future__ import annotations

from dataclasses import replace

from vramplan.facts.architecture import Architecture, Attention, DecoderLayer, Norm
from vramplan.facts.families.fields import Fields
from vramplan.facts.families.parts import Heads, attention, decoder, read_heads, split_projections, standard_mlp


def build(fields: Fields) -> Architecture:
    """Parallel attention and MLP behind one LayerNorm without bias; logits are scaled."""
    heads = read_heads(fields, default_kv_heads=None)
    hidden = heads.hidden_size
    norm = Norm("input_layernorm", hidden, "layer_python")
    layer = DecoderLayer((_attention(fields, heads), standard_mlp(fields, hidden), norm), residual="in_turn")
    layers = (layer,) * fields.required_size("num_hidden_layers")
    final_norm = Norm("model.norm", hidden, "layer_python")
    frame = decoder(fields, layers, hidden=hidden, default_positions=8192, default_tied=True, final_norm=final_norm)
    return replace(frame, logits_scaled=True)


def _attention(fields: Fields, heads: Heads) -> Attention:
    bias = fields.flag("attention_bias", default=False)
    mixer = replace(
        attention(fields, heads, split_projections(heads, qkv_bias=bias, out_bias=bias)), rotary="fp32_inputs"
    )
    if not fields.flag("use_qk_norm", default=False):
        return mixer
    return replace(
        mixer,
        q_norm=Norm("self_attn.q_norm", heads.head_dim, "layer_python", num_heads=heads.num_heads),
        k_norm=Norm("self_attn.k_norm", heads.head_dim, "layer_python", num_heads=heads.num_kv_heads),
    )
