"""StarCoder2: ``models/starcoder2/configuration_starcoder2.py`` of transformers 5.17."""

from __future__ import annotations

from dataclasses import replace

from vramplan.facts.architecture import Architecture, DecoderLayer, Norm
from vramplan.facts.families.fields import Fields
from vramplan.facts.families.parts import attention, decoder, norm_pair, plain_mlp, read_heads, split_projections


def build(fields: Fields) -> Architecture:
    """LayerNorms, a plain MLP, biases throughout, and perhaps a sliding window over every layer."""
    heads = read_heads(fields, default_kv_heads=2)
    hidden = heads.hidden_size
    bias = fields.flag("use_bias", default=True)
    dropout = fields.fraction("residual_dropout", default=0.0)
    mixer = replace(
        attention(fields, heads, split_projections(heads, qkv_bias=bias, out_bias=bias)),
        sliding_window=fields.optional_size("sliding_window", default=None),
    )
    activation = fields.text("hidden_act", default="gelu_pytorch_tanh")
    intermediate = fields.required_size("intermediate_size")
    mlp = replace(plain_mlp(hidden, intermediate, activation, "mlp.c_fc", "mlp.c_proj", bias=bias), dropout=dropout)
    layer = DecoderLayer((mixer, mlp, *norm_pair(hidden, "layer", bias=True)), residual_dropout=dropout)
    frame = decoder(
        fields,
        (layer,) * fields.required_size("num_hidden_layers"),
        hidden=hidden,
        default_positions=4096,
        default_tied=True,
        final_norm=Norm("model.norm", hidden, "layer", bias=True),
    )
    return replace(frame, embedding_dropout=fields.fraction("embedding_dropout", default=0.0))
