"""Gemma-2: ``models/gemma2/configuration_gemma2.py`` of transformers 5.17."""

from __future__ import annotations

from dataclasses import replace

from vramplan.facts.architecture import Architecture, DecoderLayer, Norm
from vramplan.facts.families.fields import Fields
from vramplan.facts.families.parts import (
    attention,
    decoder,
    gated_mlp,
    one_per_kind,
    read_heads,
    sandwich_norms,
    split_projections,
    whole_multiple,
    windows,
)


def build(fields: Fields) -> Architecture:
    """Gemma's blocks between norms on both sides; every second layer slides; scores and logits are soft-capped."""
    heads = read_heads(fields, default_kv_heads=4, head_dim=256)
    hidden = heads.hidden_size
    whole_multiple(fields, hidden, heads.num_heads)  # Gemma2Config asks it whatever head_dim says
    bias = fields.flag("attention_bias", default=False)
    mixer = replace(
        attention(fields, heads, split_projections(heads, qkv_bias=bias, out_bias=bias)),
        softcap=fields.optional_number("attn_logit_softcapping", default=50.0) is not None,
    )
    activation = fields.text("hidden_activation", default="gelu_pytorch_tanh")
    mlp, norms = gated_mlp(hidden, fields.required_size("intermediate_size"), activation), sandwich_norms(hidden)
    num_layers = fields.required_size("num_hidden_layers")
    alternating = ["full_attention" if index % 2 else "sliding_attention" for index in range(num_layers)]
    layers = one_per_kind(
        windows(fields, alternating, default_window=4096),
        lambda window: DecoderLayer((replace(mixer, sliding_window=window), mlp, *norms), residual="sandwich"),
    )
    final_norm = Norm("model.norm", hidden, "rms_gemma")
    frame = decoder(fields, layers, hidden=hidden, default_positions=8192, default_tied=True, final_norm=final_norm)
    capped = fields.optional_number("final_logit_softcapping", default=30.0) is not None
    return replace(frame, embedding_scaled=True, logits_softcap=capped, both_masks=True)
