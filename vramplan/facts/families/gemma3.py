"""Gemma-3's text model: ``Gemma3TextConfig`` in ``models/gemma3/configuration_gemma3.py`` of transformers 5.17.

Published files give only what differs from the class, sizes included, so here sizes have defaults too.
"""

from __future__ import annotations

from dataclasses import replace

from vramplan.facts.architecture import Architecture, Attention, DecoderLayer, Norm
from vramplan.facts.families.fields import Fields
from vramplan.facts.families.parts import (
    Heads,
    attention,
    decoder,
    gated_mlp,
    one_per_kind,
    sandwich_norms,
    split_projections,
    whole_multiple,
    windows,
)


def build(fields: Fields) -> Architecture:
    """Gemma-2's arrangement with norms on query and key heads; one layer in six sees everything, the others slide."""
    hidden = fields.size("hidden_size", default=2304)
    mixer = _attention(fields, hidden)
    activation = fields.text("hidden_activation", default="gelu_pytorch_tanh")
    mlp, norms = gated_mlp(hidden, fields.size("intermediate_size", default=9216), activation), sandwich_norms(hidden)
    num_layers = fields.size("num_hidden_layers", default=26)
    every = fields.size("sliding_window_pattern", default=6)
    kinds = ["sliding_attention" if (index + 1) % every else "full_attention" for index in range(num_layers)]
    layers = one_per_kind(
        windows(fields, kinds, default_window=4096),
        lambda window: DecoderLayer((replace(mixer, sliding_window=window), mlp, *norms), residual="sandwich"),
    )
    frame = decoder(
        fields,
        layers,
        hidden=hidden,
        default_positions=131_072,
        default_tied=True,
        default_vocab=262_208,
        final_norm=Norm("model.norm", hidden, "rms_gemma"),
    )
    capped = fields.optional_number("final_logit_softcapping", default=None) is not None
    return replace(frame, embedding_scaled=True, rotary_of_kind=True, logits_softcap=capped, both_masks=True)


def _attention(fields: Fields, hidden: int) -> Attention:
    num_heads = fields.size("num_attention_heads", default=8)
    whole_multiple(fields, hidden, num_heads)  # Gemma3TextConfig asks it whatever head_dim says
    kv_heads = fields.size("num_key_value_heads", default=4)
    if num_heads % kv_heads:
        raise fields.error("num_attention_heads", f"is {num_heads}, no multiple of num_key_value_heads = {kv_heads}")
    heads = Heads(hidden, num_heads, kv_heads, fields.size("head_dim", default=256))
    bias = fields.flag("attention_bias", default=False)
    return replace(
        attention(fields, heads, split_projections(heads, qkv_bias=bias, out_bias=bias)),
        q_norm=Norm("self_attn.q_norm", heads.head_dim, "rms_gemma"),
        k_norm=Norm("self_attn.k_norm", heads.head_dim, "rms_gemma"),
        softcap=fields.optional_number("attn_logit_softcapping", default=None) is not None,
    )
