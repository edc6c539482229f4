"""BLOOM: ``models/bloom/configuration_bloom.py`` of transformers 5.17."""

from __future__ import annotations

from vramplan.facts.architecture import Architecture, Attention, DecoderLayer, Embedding, Linear, Norm, Role
from vramplan.facts.families.fields import Fields
from vramplan.facts.families.parts import norm_pair, plain_mlp, whole_multiple

TRAINED_POSITIONS = 2048
"""Sequence length that BLOOM was trained on (arXiv 2211.05100, table 3); ALiBi itself has no table of positions."""


def build(fields: Fields) -> Architecture:
    """ALiBi positions, fused query/key/value, a LayerNorm on the embeddings, its own GELU."""
    hidden = fields.required_size("n_embed", "hidden_size")
    vocab = fields.required_size("vocab_size")
    input_norm, post_attention_norm = norm_pair(hidden, "layer", bias=True)
    mlp = plain_mlp(hidden, 4 * hidden, "bloom_gelu", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
    layer = DecoderLayer(
        (input_norm, _attention(fields, hidden), post_attention_norm, mlp),
        residual="inside",
        residual_dropout=fields.fraction("hidden_dropout", default=0.0),
    )
    return Architecture(
        family=fields.family,
        hidden_size=hidden,
        vocab_size=vocab,
        max_positions=fields.size("seq_length", default=TRAINED_POSITIONS),
        embeddings=(Embedding("transformer.word_embeddings", vocab, hidden),),
        embedding_norm=Norm("transformer.word_embeddings_layernorm", hidden, "layer", bias=True),
        layers=(layer,) * fields.required_size("n_layer", "num_hidden_layers"),
        final_norm=Norm("transformer.ln_f", hidden, "layer", bias=True),
        head=Linear("lm_head", hidden, vocab, bias=False, role=Role.HEAD),
        tied_embeddings=fields.flag("tie_word_embeddings", default=True),
        layer_prefix="transformer.h",
        masks_by_document=False,
    )


def _attention(fields: Fields, hidden: int) -> Attention:
    num_heads = fields.required_size("n_head", "num_attention_heads")
    return Attention(
        num_heads,
        num_heads,
        whole_multiple(fields, hidden, num_heads),
        (
            Linear("self_attention.query_key_value", hidden, 3 * hidden, bias=True, role=Role.ATTENTION),
            Linear("self_attention.dense", hidden, hidden, bias=True, role=Role.ATTENTION),
        ),
        dropout=fields.fraction("attention_dropout", default=0.0),
        fused="select",
        core="bloom",
        alibi=True,
    )
