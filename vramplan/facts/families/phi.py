"""Phi-1, Phi-1.5 and Phi-2: ``models/phi/configuration_phi.py`` of transformers 5.17."""

from __future__ import annotations

from dataclasses import replace

from vramplan.facts.architecture import Architecture, Attention, DecoderLayer, Linear, Norm, Role
from vramplan.facts.families.fields import Fields
from vramplan.facts.families.parts import Heads, attention, decoder, plain_mlp, read_heads, split_projections


def build(fields: Fields) -> Architecture:
    """Parallel attention and MLP behind one LayerNorm, biases everywhere, the head's too."""
    heads = read_heads(fields, default_kv_heads=None)
    hidden = heads.hidden_size
    activation = fields.text("hidden_act", default="gelu_new")
    mlp = plain_mlp(hidden, fields.required_size("intermediate_size"), activation, "mlp.fc1", "mlp.fc2")
    layer = DecoderLayer(
        (_attention(fields, heads), mlp, Norm("input_layernorm", hidden, "layer", bias=True)),
        residual="parallel",
        residual_dropout=fields.fraction("resid_pdrop", default=0.0),
        dropout_modules=("resid_dropout", "resid_dropout"),
    )
    frame = decoder(
        fields,
        (layer,) * fields.required_size("num_hidden_layers"),
        hidden=hidden,
        default_positions=2048,
        default_tied=False,
        final_norm=Norm("model.final_layernorm", hidden, "layer", bias=True),
    )
    head = Linear("lm_head", hidden, frame.vocab_size, bias=True, role=Role.HEAD)
    dropout = fields.fraction("embd_pdrop", default=0.0)
    frame = replace(frame, embedding_dropout=dropout, embedding_dropout_module="model.embed_dropout")
    return replace(frame, head=head, holds_embedding=False)


def _attention(fields: Fields, heads: Heads) -> Attention:
    mixer = replace(
        attention(fields, heads, split_projections(heads, qkv_bias=True, out_bias=True, out="dense")),
        rotary_dim=int(heads.head_dim * fields.rotary_frac("partial_rotary_factor", default=0.5)),
        rotary="named_slices",
    )
    if not fields.flag("qk_layernorm", default=False):
        return mixer
    width = heads.hidden_size // heads.num_heads
    return replace(
        mixer,
        q_norm=Norm("self_attn.q_layernorm", width, "layer", bias=True),
        k_norm=Norm("self_attn.k_layernorm", width, "layer", bias=True),
    )
