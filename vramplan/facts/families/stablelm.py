"""StableLM: ``models/stablelm/configuration_stablelm.py`` of transformers 5.17."""

from __future__ import annotations

from dataclasses import replace

from vramplan.facts.architecture import Architecture, Attention, DecoderLayer, Norm
from vramplan.facts.families.fields import Fields
from vramplan.facts.families.parts import (
    Heads,
    attention,
    decoder,
    norm_pair,
    read_heads,
    split_projections,
    standard_mlp,
)


def build(fields: Fields) -> Architecture:
    """Llama's blocks with LayerNorms, rotary on part of each head, and perhaps one norm for both branches."""
    heads = read_heads(fields, default_kv_heads=32)
    hidden = heads.hidden_size
    norms = norm_pair(hidden, "layer", bias=True)
    parallel = fields.flag("use_parallel_residual", default=False)
    layer = DecoderLayer(
        (_attention(fields, heads), standard_mlp(fields, hidden), *(norms[:1] if parallel else norms)),
        residual="in_turn" if parallel else "sequential",
        residual_dropout=fields.fraction("hidden_dropout", default=0.0),
        dropout_modules=("", "dropout"),
        drops_attention=False,
        names_attention="input and result",
    )
    return decoder(
        fields,
        (layer,) * fields.required_size("num_hidden_layers"),
        hidden=hidden,
        default_positions=4096,
        default_tied=False,
        final_norm=Norm("model.norm", hidden, "layer", bias=True),
    )


def _attention(fields: Fields, heads: Heads) -> Attention:
    mixer = replace(
        attention(fields, heads, split_projections(heads, qkv_bias=fields.flag("use_qkv_bias", default=False))),
        rotary_dim=int(heads.head_dim * fields.rotary_frac("partial_rotary_factor", default=0.25)),
        rotary="named_slices",
    )
    if not fields.flag("qk_layernorm", default=False):
        return mixer
    return replace(
        mixer,
        q_norm=_per_head("self_attn.q_layernorm", heads.head_dim, heads.num_heads),
        k_norm=_per_head("self_attn.k_layernorm", heads.head_dim, heads.num_kv_heads),
    )


def _per_head(name: str, width: int, num_heads: int) -> Norm:
    return Norm(name, width, "layer", num_heads=num_heads, separate_heads=True)
