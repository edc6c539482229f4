"""gpt-oss: ``models/gpt_oss/configuration_gpt_oss.py`` of transformers 5.17."""

from __future__ import annotations

from dataclasses import replace

from vramplan.facts.architecture import Architecture, DecoderLayer, MixtureOfExperts, Norm, Router
from vramplan.facts.families.fields import Fields
from vramplan.facts.families.parts import (
    attention,
    decoder,
    norm_pair,
    one_per_kind,
    read_heads,
    routed_experts,
    router_scores,
    split_projections,
    windows,
)


def build(fields: Fields) -> Architecture:
    """Biased attention with a learned sink a head, every second layer sliding; biased, transposed experts."""
    heads = read_heads(fields, default_kv_heads=8, head_dim=64)
    hidden = heads.hidden_size
    bias = fields.flag("attention_bias", default=True)
    mixer = replace(
        attention(fields, heads, split_projections(heads, qkv_bias=bias, out_bias=bias)), sinks=True, rotary="halves"
    )
    rest = (_mixture(fields, hidden), *norm_pair(hidden, "rms_fp32"))
    num_layers = fields.required_size("num_hidden_layers")
    alternating = ["full_attention" if index % 2 else "sliding_attention" for index in range(num_layers)]
    layers = one_per_kind(
        windows(fields, alternating, default_window=128),
        lambda window: DecoderLayer((replace(mixer, sliding_window=window), *rest)),
    )
    final_norm = Norm("model.norm", hidden, "rms_fp32")
    model = decoder(fields, layers, hidden=hidden, default_positions=131_072, default_tied=False, final_norm=final_norm)
    return replace(model, router_scores=router_scores(fields), masks_by_document=False, both_masks=True)


def _mixture(fields: Fields, hidden: int) -> MixtureOfExperts:
    experts = routed_experts(fields, "mlp.experts", hidden, "num_local_experts", "intermediate_size", "num_experts")
    return MixtureOfExperts(
        fields.size("num_experts_per_tok", default=4),
        "gpt_oss_glu",  # clamped, sigmoid(1.702 x) gated: GptOssExperts._apply_gate, whatever hidden_act says
        (
            Router("mlp.router", hidden, experts.num_experts, bias=True),
            replace(experts, bias=True, transposed=True),
        ),
        scoring="best",
    )
