"""Mixtral: ``models/mixtral/configuration_mixtral.py`` of transformers 5.17."""

from __future__ import annotations

from dataclasses import replace

from vramplan.facts.architecture import Architecture, DecoderLayer, MixtureOfExperts, Router
from vramplan.facts.families.fields import Fields
from vramplan.facts.families.parts import (
    attention,
    decoder,
    norm_pair,
    read_heads,
    routed_experts,
    router_scores,
    split_projections,
)


def build(fields: Fields) -> Architecture:
    """Mistral's attention; every layer has routed experts and no shared one."""
    heads = read_heads(fields, default_kv_heads=8)
    hidden = heads.hidden_size
    window = fields.optional_size("sliding_window", default=None)
    experts = routed_experts(fields, "mlp.experts", hidden, "num_local_experts", "intermediate_size", "num_experts")
    mixture = MixtureOfExperts(
        fields.size("num_experts_per_tok", default=2),
        fields.text("hidden_act", default="silu"),
        (Router("mlp.gate", hidden, experts.num_experts), experts),
        scoring="softmax_fp32",
        jitter=fields.fraction("router_jitter_noise", default=0.0) > 0,
    )
    mixer = replace(attention(fields, heads, split_projections(heads)), sliding_window=window)
    layers = (DecoderLayer((mixer, mixture, *norm_pair(hidden))),) * fields.required_size("num_hidden_layers")
    model = decoder(fields, layers, hidden=hidden, default_positions=131_072, default_tied=False)
    return replace(model, router_scores=router_scores(fields))
