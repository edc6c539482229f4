"""Llama-4's text model: ``Llama4TextConfig`` in ``models/llama4/configuration_llama4.py`` of transformers 5.17."""

from __future__ import annotations

from dataclasses import replace

from vramplan.facts.architecture import Architecture, Attention, DecoderLayer, MixtureOfExperts, Norm, Router
from vramplan.facts.families.fields import Fields
from vramplan.facts.families.parts import (
    Heads,
    attention,
    decoder,
    gated_mlp,
    layer_kinds,
    norm_pair,
    one_per_kind,
    read_heads,
    rotated_layers,
    routed_experts,
    split_projections,
)


def build(fields: Fields) -> Architecture:
    """Three layers in four rotate and attend within chunks; experts with a shared one on every or every n-th layer."""
    heads = read_heads(fields, default_kv_heads=8, head_dim=128)
    hidden = heads.hidden_size
    activation = fields.text("hidden_act", default="silu")
    dense = gated_mlp(hidden, fields.size("intermediate_size_mlp", default=16_384), activation, prefix="feed_forward")
    sparse, norms = _mixture(fields, hidden, activation), norm_pair(hidden, "rms_last")

    def layer(kind: tuple[bool, str, bool]) -> DecoderLayer:
        rotated, attention_kind, is_sparse = kind
        mixer = _attention(fields, heads, rotated=rotated, chunked=attention_kind == "chunked_attention")
        return DecoderLayer(
            (mixer, sparse if is_sparse else dense, *norms),
            feed_forward_name="feed_forward",
            names_attention="result",
            views_result=True,
        )

    layers = one_per_kind(_kinds(fields, fields.required_size("num_hidden_layers")), layer)
    final_norm = Norm("model.norm", hidden, "rms_last")
    frame = decoder(fields, layers, hidden=hidden, default_positions=131_072, default_tied=False, final_norm=final_norm)
    collects = fields.flag("output_router_logits", default=False)
    return replace(frame, both_masks=True, reads_embedding=True, router_scores="collected" if collects else "dropped")


def _kinds(fields: Fields, num_layers: int) -> list[tuple[bool, str, bool]]:
    """Of each layer: whether it rotates, its kind of attention, whether it has experts."""
    rotated = rotated_layers(fields, num_layers)
    attentions = layer_kinds(fields, ["chunked_attention" if it else "full_attention" for it in rotated])
    step = fields.size("interleave_moe_layer_step", default=1)
    sparse = fields.whole_numbers("moe_layers") if fields.has_value("moe_layers") else range(step - 1, num_layers, step)
    return [(rotated[index], attentions[index], index in sparse) for index in range(num_layers)]


def _attention(fields: Fields, heads: Heads, *, rotated: bool, chunked: bool) -> Attention:
    bias = fields.flag("attention_bias", default=False)
    normed = rotated and fields.flag("use_qk_norm", default=True)
    norm = Norm("self_attn.qk_norm", heads.head_dim, "l2", affine=False) if normed else None
    return replace(
        attention(fields, heads, split_projections(heads, qkv_bias=bias, out_bias=bias)),
        q_norm=norm,
        k_norm=norm,
        normed_late=True,
        tempered=not rotated and fields.flag("attn_temperature_tuning", default=True),
        softmax_fp32=False,
        casts_softmax=False,
        rotary_dim=heads.head_dim if rotated else 0,
        rotary="complex",
        chunk=fields.optional_size("attention_chunk_size", default=8192) if chunked else None,
    )


def _mixture(fields: Fields, hidden: int, activation: str) -> MixtureOfExperts:
    experts = routed_experts(fields, "feed_forward.experts", hidden, "num_local_experts", "intermediate_size")
    return MixtureOfExperts(
        fields.size("num_experts_per_tok", default=1),
        activation,
        (
            replace(experts, transposed=True, seen_as_untransposed=True),
            Router("feed_forward.router", hidden, experts.num_experts, is_linear=True),
            gated_mlp(hidden, experts.intermediate, activation, prefix="feed_forward.shared_expert"),
        ),
        scoring="sigmoid_of_all",
    )
