"""OLMo-2: ``models/olmo2/configuration_olmo2.py`` of transformers 5.17."""

from __future__ import annotations

from dataclasses import replace

from vramplan.facts.architecture import Architecture, DecoderLayer, Norm
from vramplan.facts.families.fields import Fields
from vramplan.facts.families.parts import attention, decoder, read_heads, split_projections, standard_mlp


def build(fields: Fields) -> Architecture:
    """Norms after attention and MLP instead of before, and over the whole query and key projections."""
    heads = read_heads(fields, default_kv_heads=None)
    hidden = heads.hidden_size
    bias = fields.flag("attention_bias", default=False)
    mixer = replace(
        attention(fields, heads, split_projections(heads, qkv_bias=bias, out_bias=bias)),
        rotary="fp32",
        normed_at_once=True,
        q_norm=Norm("self_attn.q_norm", heads.num_heads * heads.head_dim, "rms_fp32"),
        k_norm=Norm("self_attn.k_norm", heads.num_kv_heads * heads.head_dim, "rms_fp32"),
    )
    norms = (
        Norm("post_attention_layernorm", hidden, "rms_fp32"),
        Norm("post_feedforward_layernorm", hidden, "rms_fp32"),
    )
    layer = DecoderLayer((mixer, standard_mlp(fields, hidden), *norms), residual="norm_after")
    layers = (layer,) * fields.required_size("num_hidden_layers")
    final_norm = Norm("model.norm", hidden, "rms_fp32")
    return decoder(fields, layers, hidden=hidden, default_positions=2048, default_tied=False, final_norm=final_norm)
