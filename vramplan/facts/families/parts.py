"""Blocks that several families spell alike; the spellings come in as arguments."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from vramplan.facts.architecture import Architecture, DecoderLayer, Embedding, GatedMLP, Linear, Norm, Role
from vramplan.facts.families.fields import Fields

Kind = TypeVar("Kind", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Heads:
    """Widths of one attention block: ``num_heads`` query and ``num_kv_heads`` key/value heads of ``head_dim``."""

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int


def read_heads(fields: Fields, *, default_kv_heads: int | None, head_dim: int | None = None) -> Heads:
    """Head counts and widths in the common spelling.

    ``default_kv_heads``: the class default of ``num_key_value_heads`` (``null`` means as many as query heads);
    ``head_dim``: the class default, None where it is hidden size over heads.

    Raises:
        ConfigError: the hidden size does not divide into the heads, or the heads into the key/value heads.
    """
    hidden = fields.required_size("hidden_size")
    num_heads = fields.required_size("num_attention_heads")
    kv_heads = fields.optional_size("num_key_value_heads", default=default_kv_heads) or num_heads
    width = fields.optional_size("head_dim", default=head_dim)
    if width is None:
        if hidden % num_heads:
            raise fields.error("hidden_size", f"is {hidden}, no multiple of num_attention_heads = {num_heads}")
        width = hidden // num_heads
    if num_heads % kv_heads:
        raise fields.error("num_attention_heads", f"is {num_heads}, no multiple of num_key_value_heads = {kv_heads}")
    return Heads(hidden, num_heads, kv_heads, width)


def split_projections(
    heads: Heads, *, qkv_bias: bool = False, out_bias: bool = False, prefix: str = "self_attn", out: str = "o_proj"
) -> tuple[Linear, ...]:
    """Query, key, value and output projections as four linears."""
    q_width, kv_width = heads.num_heads * heads.head_dim, heads.num_kv_heads * heads.head_dim
    return (
        Linear(f"{prefix}.q_proj", heads.hidden_size, q_width, qkv_bias, Role.ATTENTION),
        Linear(f"{prefix}.k_proj", heads.hidden_size, kv_width, qkv_bias, Role.ATTENTION),
        Linear(f"{prefix}.v_proj", heads.hidden_size, kv_width, qkv_bias, Role.ATTENTION),
        Linear(f"{prefix}.{out}", q_width, heads.hidden_size, out_bias, Role.ATTENTION),
    )


def gated_mlp(
    hidden: int, intermediate: int, activation: str, *, bias: bool = False, prefix: str = "mlp", role: Role = Role.MLP
) -> GatedMLP:
    """Gate, up and down projections as three linears."""
    return GatedMLP(
        intermediate,
        activation,
        (
            Linear(f"{prefix}.gate_proj", hidden, intermediate, bias, role),
            Linear(f"{prefix}.up_proj", hidden, intermediate, bias, role),
            Linear(f"{prefix}.down_proj", intermediate, hidden, bias, role),
        ),
    )


def rms_pair(hidden: int) -> tuple[Norm, Norm]:
    """The two RMS norms before attention and before the MLP."""
    return Norm("input_layernorm", hidden), Norm("post_attention_layernorm", hidden)


def sliding_layers(fields: Fields, num_layers: int) -> tuple[int | None, ...]:
    """Each layer's sliding window as Qwen's configs say it: ``layer_types``, else ``max_window_layers``, else none."""
    window = fields.optional_size("sliding_window", default=4096)
    if not fields.flag("use_sliding_window", default=False) or window is None:
        return (None,) * num_layers
    types = fields.per_layer("layer_types", num_layers)
    if types is not None:
        return tuple(window if kind == "sliding_attention" else None for kind in types)
    first = fields.count("max_window_layers", default=28)
    return tuple(window if index >= first else None for index in range(num_layers))


def one_per_kind(kinds: Sequence[Kind], make: Callable[[Kind], DecoderLayer]) -> tuple[DecoderLayer, ...]:
    """Layers whose kinds are given in order; equal kinds share one object (an estimate works once for each)."""
    made: dict[Kind, DecoderLayer] = {}
    for kind in kinds:
        if kind not in made:
            made[kind] = make(kind)
    return tuple(made[kind] for kind in kinds)


def decoder(
    fields: Fields,
    layers: Sequence[DecoderLayer],
    *,
    hidden: int,
    default_positions: int,
    default_tied: bool,
    final_norm: Norm | None = None,
) -> Architecture:
    """The frame around the layers in Llama's spelling: ``model.embed_tokens``, ``model.norm``, ``lm_head``."""
    vocab = fields.required_size("vocab_size")
    return Architecture(
        family=fields.family,
        hidden_size=hidden,
        vocab_size=vocab,
        max_positions=fields.size("max_position_embeddings", default=default_positions),
        embeddings=(Embedding("model.embed_tokens", vocab, hidden),),
        layers=tuple(layers),
        final_norm=final_norm or Norm("model.norm", hidden),
        head=Linear("lm_head", hidden, vocab, bias=False, role=Role.HEAD),
        tied_embeddings=fields.flag("tie_word_embeddings", default=default_tied),
    )
