"""Qwen3-MoE: ``models/qwen3_moe/configuration_qwen3_moe.py`` of transformers 5.17."""

from __future__ import annotations

from dataclasses import replace

from vramplan.facts.architecture import Architecture, Attention, DecoderLayer, MixtureOfExperts, Norm, Router
from vramplan.facts.families.fields import Fields
from vramplan.facts.families.parts import (
    Heads,
    attention,
    decoder,
    norm_pair,
    one_per_kind,
    read_heads,
    routed_experts,
    router_scores,
    sparse_layers,
    split_projections,
    standard_mlp,
)


def build(fields: Fields) -> Architecture:
    """Qwen3's attention; routed experts without a shared one on the sparse layers."""
    heads = read_heads(fields, default_kv_heads=4)
    hidden = heads.hidden_size
    experts = routed_experts(fields, "mlp.experts", hidden, "num_experts", "moe_intermediate_size", "num_local_experts")
    sparse = MixtureOfExperts(
        fields.size("num_experts_per_tok", default=8),
        fields.text("hidden_act", default="silu"),
        (experts, Router("mlp.gate", hidden, experts.num_experts)),
        normalises=fields.flag("norm_topk_prob", default=False),
    )
    mixer, dense, norms = _attention(fields, heads), standard_mlp(fields, hidden), norm_pair(hidden)
    layers = one_per_kind(
        sparse_layers(fields, fields.required_size("num_hidden_layers")),
        lambda is_sparse: DecoderLayer((mixer, sparse if is_sparse else dense, *norms)),
    )
    model = decoder(fields, layers, hidden=hidden, default_positions=32_768, default_tied=False)
    return replace(model, router_scores=router_scores(fields))


def _attention(fields: Fields, heads: Heads) -> Attention:
    bias = fields.flag("attention_bias", default=False)
    slides = fields.flag("use_sliding_window", default=False)
    return replace(
        attention(fields, heads, split_projections(heads, qkv_bias=bias, out_bias=bias)),
        normed_at_once=True,
        q_norm=Norm("self_attn.q_norm", heads.head_dim),
        k_norm=Norm("self_attn.k_norm", heads.head_dim),
        sliding_window=fields.optional_size("sliding_window", default=4096) if slides else None,
    )
