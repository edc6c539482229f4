"""Qwen1.5-MoE and Qwen2-MoE: ``models/qwen2_moe/configuration_qwen2_moe.py`` of transformers 5.17."""

from __future__ import annotations

from dataclasses import replace

from vramplan.facts.architecture import Architecture, DecoderLayer, Linear, MixtureOfExperts, Role, Router
from vramplan.facts.families.fields import Fields
from vramplan.facts.families.parts import (
    attention,
    decoder,
    gated_mlp,
    norm_pair,
    one_per_kind,
    read_heads,
    routed_experts,
    router_scores,
    sparse_layers,
    split_projections,
    standard_mlp,
    windows,
)


def build(fields: Fields) -> Architecture:
    """Qwen2's attention; routed experts with a shared one that a sigmoid weighs, on the sparse layers."""
    heads = read_heads(fields, default_kv_heads=16)
    num_layers = fields.required_size("num_hidden_layers")
    biased = fields.flag("qkv_bias", default=True)
    mixer = attention(fields, heads, split_projections(heads, qkv_bias=biased))
    dense, sparse = standard_mlp(fields, heads.hidden_size), _mixture(fields, heads.hidden_size)
    norms = norm_pair(heads.hidden_size)

    def layer(kind: tuple[int | None, bool]) -> DecoderLayer:
        window, is_sparse = kind
        return DecoderLayer((replace(mixer, sliding_window=window), sparse if is_sparse else dense, *norms))

    sliding = _windows(fields, num_layers)
    layers = one_per_kind(tuple(zip(sliding, sparse_layers(fields, num_layers), strict=True)), layer)
    model = decoder(fields, layers, hidden=heads.hidden_size, default_positions=32_768, default_tied=False)
    spare = not fields.flag("use_sliding_window", default=False)
    return replace(model, spare_mask=spare, both_masks=any(sliding), router_scores=router_scores(fields))


def _windows(fields: Fields, num_layers: int) -> tuple[int | None, ...]:
    """Every second layer below ``max_window_layers`` slides, if sliding is on."""
    if not fields.flag("use_sliding_window", default=False):
        return (None,) * num_layers
    first_whole = fields.count("max_window_layers", default=28)
    slides = [index % 2 == 0 and index < first_whole for index in range(num_layers)]
    return windows(fields, ["sliding_attention" if it else "full_attention" for it in slides], default_window=4096)


def _mixture(fields: Fields, hidden: int) -> MixtureOfExperts:
    activation = fields.text("hidden_act", default="silu")
    experts = routed_experts(fields, "mlp.experts", hidden, "num_experts", "moe_intermediate_size")
    shared = fields.required_size("shared_expert_intermediate_size")
    return MixtureOfExperts(
        fields.size("num_experts_per_tok", default=4),
        activation,
        (
            Router("mlp.gate", hidden, experts.num_experts),
            experts,
            gated_mlp(hidden, shared, activation, prefix="mlp.shared_expert"),
            Linear("mlp.shared_expert_gate", hidden, 1, bias=False, role=Role.ROUTER),
        ),
        normalises=fields.flag("norm_topk_prob", default=False),
    )
