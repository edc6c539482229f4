"""Falcon: ``models/falcon/configuration_falcon.py`` of transformers 5.17."""

from __future__ import annotations

from dataclasses import replace

from vramplan.facts.architecture import Architecture, Attention, DecoderLayer, Embedding, Linear, Norm, PlainMLP, Role
from vramplan.facts.families.fields import Fields
from vramplan.facts.families.parts import norm_pair, plain_mlp, whole_multiple


def build(fields: Fields) -> Architecture:
    """Parallel attention and MLP, fused query/key/value with few key/value heads; Falcon-40B has a norm for each."""
    hidden = fields.required_size("hidden_size", "n_embed")
    vocab = fields.required_size("vocab_size")
    bias = fields.flag("bias", default=False)
    mlp = _by_matmul(
        plain_mlp(
            hidden,
            fields.optional_size("ffn_hidden_size", default=None) or 4 * hidden,
            fields.text("activation", default="gelu"),
            "mlp.dense_h_to_4h",
            "mlp.dense_4h_to_h",
            bias=bias,
        )
    )
    parallel = fields.flag("parallel_attn", default=True)
    layer = DecoderLayer(
        (_attention(fields, hidden, bias), mlp, *_norms(fields, hidden, parallel)),
        residual="parallel" if parallel or _is_new(fields) else "sequential",
        residual_dropout=fields.fraction("hidden_dropout", default=0.0),
        norms_first=True,
        names_attention="input and result",
    )
    return Architecture(
        family=fields.family,
        hidden_size=hidden,
        vocab_size=vocab,
        max_positions=fields.size("max_position_embeddings", default=2048),
        embeddings=(Embedding("transformer.word_embeddings", vocab, hidden),),
        layers=(layer,) * fields.required_size("num_hidden_layers"),
        final_norm=Norm("transformer.ln_f", hidden, "layer", bias=True),
        head=Linear("lm_head", hidden, vocab, bias=False, role=Role.HEAD),
        tied_embeddings=fields.flag("tie_word_embeddings", default=True),
        layer_prefix="transformer.h",
        masks_by_document=False,
    )


def _is_new(fields: Fields) -> bool:
    """Falcon-40B's arrangement, which ignores ``multi_query``."""
    return fields.flag("new_decoder_architecture", default=False)


def _attention(fields: Fields, hidden: int, bias: bool) -> Attention:
    num_heads = fields.required_size("num_attention_heads")
    head_dim = whole_multiple(fields, hidden, num_heads)
    kv_heads = fields.optional_size("num_kv_heads", default=None) or num_heads
    if not _is_new(fields):
        kv_heads = 1 if fields.flag("multi_query", default=True) else num_heads
    alibi = fields.flag("alibi", default=False)
    return Attention(
        num_heads,
        kv_heads,
        head_dim,
        (
            Linear(
                "self_attention.query_key_value",
                hidden,
                hidden + 2 * kv_heads * head_dim,
                bias,
                Role.ATTENTION,
                by_matmul=True,
            ),
            Linear("self_attention.dense", hidden, hidden, bias, Role.ATTENTION, by_matmul=True),
        ),
        dropout=fields.fraction("attention_dropout", default=0.0),
        rotary_dim=0 if alibi else head_dim,
        fused="spread" if _is_new(fields) else "index" if fields.flag("multi_query", default=True) else "select",
        core="falcon",
        alibi=alibi,
    )


def _by_matmul(mlp: PlainMLP) -> PlainMLP:
    up, down = mlp.projections
    return replace(mlp, projections=(replace(up, by_matmul=True), replace(down, by_matmul=True)))


def _norms(fields: Fields, hidden: int, parallel: bool) -> tuple[Norm, ...]:
    if not parallel:
        return norm_pair(hidden, "layer", bias=True)[::-1]
    both = fields.optional_size("num_ln_in_parallel_attn", default=None) or (2 if _is_new(fields) else 1)
    names = ("ln_attn", "ln_mlp") if both == 2 else ("input_layernorm",)
    return tuple(Norm(name, hidden, "layer", bias=True) for name in names)
