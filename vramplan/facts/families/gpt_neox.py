"""GPT-NeoX and Pythia: ``models/gpt_neox/configuration_gpt_neox.py`` of transformers 5.17."""

from __future__ import annotations

from vramplan.facts.architecture import Architecture, Attention, DecoderLayer, Embedding, Linear, Norm, Role
from vramplan.facts.families.fields import Fields
from vramplan.facts.families.parts import norm_pair, plain_mlp, whole_multiple


def build(fields: Fields) -> Architecture:
    """Parallel attention and MLP with a LayerNorm each, fused query/key/value, rotary on part of each head."""
    hidden = fields.required_size("hidden_size")
    vocab = fields.required_size("vocab_size")
    dropout = fields.fraction("hidden_dropout", default=0.0)
    mlp = plain_mlp(
        hidden,
        fields.required_size("intermediate_size"),
        fields.text("hidden_act", default="gelu"),
        "mlp.dense_h_to_4h",
        "mlp.dense_4h_to_h",
    )
    layer = DecoderLayer(
        (*norm_pair(hidden, "layer", bias=True), _attention(fields, hidden), mlp),
        residual="parallel" if fields.flag("use_parallel_residual", default=True) else "sequential",
        residual_dropout=dropout,
        dropout_modules=("post_attention_dropout", "post_mlp_dropout"),
    )
    return Architecture(
        family=fields.family,
        hidden_size=hidden,
        vocab_size=vocab,
        max_positions=fields.size("max_position_embeddings", default=2048),
        embeddings=(Embedding("gpt_neox.embed_in", vocab, hidden),),
        layers=(layer,) * fields.required_size("num_hidden_layers"),
        final_norm=Norm("gpt_neox.final_layer_norm", hidden, "layer", bias=True),
        head=Linear("lm_head", hidden, vocab, bias=False, role=Role.HEAD),
        tied_embeddings=fields.flag("tie_word_embeddings", default=False),
        layer_prefix="gpt_neox.layers",
        embedding_dropout=dropout,
        embedding_dropout_module="gpt_neox.emb_dropout",
    )


def _attention(fields: Fields, hidden: int) -> Attention:
    num_heads = fields.required_size("num_attention_heads")
    head_dim = whole_multiple(fields, hidden, num_heads)
    bias = fields.flag("attention_bias", default=True)
    return Attention(
        num_heads,
        num_heads,
        head_dim,
        (
            Linear("attention.query_key_value", hidden, 3 * hidden, bias, Role.ATTENTION),
            Linear("attention.dense", hidden, hidden, bias, Role.ATTENTION),
        ),
        dropout=fields.fraction("attention_dropout", default=0.0),
        rotary_dim=int(head_dim * fields.rotary_frac("rotary_pct", default=0.25)),
        rotary="sliced",
    )
