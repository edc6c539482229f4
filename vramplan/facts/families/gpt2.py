"""GPT-2 (and GPT-3 175B, which has its blocks): ``models/gpt2/configuration_gpt2.py`` of transformers 5.17."""

from __future__ import annotations

from vramplan.facts.architecture import (
    Architecture,
    Attention,
    DecoderLayer,
    Embedding,
    Linear,
    Norm,
    PlainMLP,
    Role,
)
from vramplan.facts.families.fields import Fields


def build(fields: Fields) -> Architecture:
    """Learned positions, fused query/key/value in a ``Conv1D``, LayerNorm with bias, dropout everywhere."""
    hidden = fields.required_size("n_embd", "hidden_size")
    vocab = fields.required_size("vocab_size")
    positions = fields.size("n_positions", "max_position_embeddings", default=1024)
    if fields.flag("add_cross_attention", default=False):
        raise fields.error("add_cross_attention", "is true, but only decoder-only models are known")
    layer = DecoderLayer(
        (_norm("ln_1", hidden), _attention(fields, hidden), _norm("ln_2", hidden), _mlp(fields, hidden)),
        residual_dropout=fields.fraction("resid_pdrop", default=0.1),
        dropout_modules=("attn.resid_dropout", ""),
        names_attention="result",
    )
    return Architecture(
        family=fields.family,
        hidden_size=hidden,
        vocab_size=vocab,
        max_positions=positions,
        embeddings=(Embedding("transformer.wte", vocab, hidden), Embedding("transformer.wpe", positions, hidden)),
        layers=(layer,) * fields.required_size("n_layer", "num_hidden_layers"),
        final_norm=_norm("transformer.ln_f", hidden),
        head=Linear("lm_head", hidden, vocab, bias=False, role=Role.HEAD),
        tied_embeddings=fields.flag("tie_word_embeddings", default=True),
        layer_prefix="transformer.h",
        embedding_dropout=fields.fraction("embd_pdrop", default=0.1),
        embedding_dropout_module="transformer.drop",
    )


def _norm(name: str, hidden: int) -> Norm:
    return Norm(name, hidden, kind="layer", bias=True)


def _attention(fields: Fields, hidden: int) -> Attention:
    num_heads = fields.required_size("n_head", "num_attention_heads")
    if hidden % num_heads:
        raise fields.error("n_embd", f"is {hidden}, no multiple of n_head = {num_heads}")
    return Attention(
        num_heads,
        num_heads,
        hidden // num_heads,
        (
            Linear("attn.c_attn", hidden, 3 * hidden, bias=True, role=Role.ATTENTION, conv1d=True),
            Linear("attn.c_proj", hidden, hidden, bias=True, role=Role.ATTENTION, conv1d=True),
        ),
        dropout=fields.fraction("attn_pdrop", default=0.1),
        softmax_fp32=False,
    )


def _mlp(fields: Fields, hidden: int) -> PlainMLP:
    inner = fields.optional_size("n_inner", default=None) or 4 * hidden
    return PlainMLP(
        inner,
        fields.text("activation_function", default="gelu_new"),
        (
            Linear("mlp.c_fc", hidden, inner, bias=True, role=Role.MLP, conv1d=True),
            Linear("mlp.c_proj", inner, hidden, bias=True, role=Role.MLP, conv1d=True),
        ),
        dropout=fields.fraction("resid_pdrop", default=0.1),
        dropout_module="mlp.dropout",
    )
