"""OPT: ``models/opt/configuration_opt.py`` of transformers 5.17."""

from __future__ import annotations

from vramplan.facts.architecture import Architecture, Attention, DecoderLayer, Embedding, Linear, Norm, Role
from vramplan.facts.families.fields import Fields
from vramplan.facts.families.parts import plain_mlp, whole_multiple

POSITION_OFFSET = 2
"""Rows of the position table before the first position (``OPTLearnedPositionalEmbedding.offset``)."""


def build(fields: Fields) -> Architecture:
    """Learned positions, LayerNorm before each block (after it in OPT-350m), ReLU, dropout on both branches."""
    hidden = fields.required_size("hidden_size")
    vocab = fields.required_size("vocab_size")
    positions = fields.size("max_position_embeddings", default=2048)
    narrow = fields.optional_size("word_embed_proj_dim", default=None) or hidden
    norm_first = fields.flag("do_layer_norm_before", default=True)
    no_final_norm = not norm_first or fields.flag("_remove_final_layer_norm", default=False)
    prefix = "model.decoder"
    return Architecture(
        family=fields.family,
        hidden_size=hidden,
        vocab_size=vocab,
        max_positions=positions,
        embeddings=(
            Embedding(f"{prefix}.embed_tokens", vocab, narrow),
            Embedding(f"{prefix}.embed_positions", positions + POSITION_OFFSET, hidden, each_sequence=True),
        ),
        embedding_projections=_projections(prefix, hidden, narrow),
        layers=(_layer(fields, hidden, norm_first),) * fields.required_size("num_hidden_layers"),
        final_norm=None if no_final_norm else _norm(fields, f"{prefix}.final_layer_norm", hidden),
        norm_before_layers=True,
        head=Linear("lm_head", narrow, vocab, bias=False, role=Role.HEAD),
        tied_embeddings=fields.flag("tie_word_embeddings", default=True),
        layer_prefix=f"{prefix}.layers",
        masks_by_document=False,
    )


def _projections(prefix: str, hidden: int, narrow: int) -> tuple[Linear, ...]:
    if narrow == hidden:
        return ()
    return (
        Linear(f"{prefix}.project_out", hidden, narrow, bias=False, role=Role.EMBEDDING),
        Linear(f"{prefix}.project_in", narrow, hidden, bias=False, role=Role.EMBEDDING),
    )


def _layer(fields: Fields, hidden: int, norm_first: bool) -> DecoderLayer:
    bias = fields.flag("enable_bias", default=True)
    num_heads = fields.required_size("num_attention_heads")
    attention = Attention(
        num_heads,
        num_heads,
        whole_multiple(fields, hidden, num_heads),
        tuple(
            Linear(f"self_attn.{name}", hidden, hidden, bias, Role.ATTENTION)
            for name in ("k_proj", "v_proj", "q_proj", "out_proj")
        ),
        dropout=fields.fraction("attention_dropout", default=0.0),
        order=(2, 0, 1),
        q_scaled=True,
    )
    activation = fields.text("activation_function", default="relu")
    mlp = plain_mlp(hidden, fields.required_size("ffn_dim"), activation, "fc1", "fc2", bias=bias)
    return DecoderLayer(
        (attention, _norm(fields, "self_attn_layer_norm", hidden), mlp, _norm(fields, "final_layer_norm", hidden)),
        residual="sequential" if norm_first else "post",
        residual_dropout=fields.fraction("dropout", default=0.1),
        feed_forward_name="",
    )


def _norm(fields: Fields, name: str, hidden: int) -> Norm:
    affine = fields.flag("layer_norm_elementwise_affine", default=True)
    return Norm(name, hidden, kind="layer", bias=True, affine=affine)
