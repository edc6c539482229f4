"""OLMo: ``models/olmo/configuration_olmo.py`` of transformers 5.17."""

from __future__ import annotations

from dataclasses import replace

from vramplan.facts.architecture import Architecture, DecoderLayer, Norm
from vramplan.facts.families.fields import Fields
from vramplan.facts.families.parts import attention, decoder, read_heads, split_projections, standard_mlp


def build(fields: Fields) -> Architecture:
    """Llama's blocks with LayerNorms that have no parameters and run in fp32."""
    heads = read_heads(fields, default_kv_heads=None)
    hidden = heads.hidden_size
    bias = fields.flag("attention_bias", default=False)
    mixer = replace(
        attention(fields, heads, split_projections(heads, qkv_bias=bias, out_bias=bias)),
        rotary="fp32",
        clip_qkv=fields.optional_number("clip_qkv", default=None) is not None,
    )
    norms = _norm("input_layernorm", hidden), _norm("post_attention_layernorm", hidden)
    layers = (DecoderLayer((mixer, standard_mlp(fields, hidden), *norms)),) * fields.required_size("num_hidden_layers")
    final_norm = _norm("model.norm", hidden)
    return decoder(fields, layers, hidden=hidden, default_positions=2048, default_tied=False, final_norm=final_norm)


def _norm(name: str, hidden: int) -> Norm:
    return Norm(name, hidden, kind="layer_fp32", affine=False)
