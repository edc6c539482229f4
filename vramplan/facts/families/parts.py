"""Blocks that several families spell alike; the spellings come in as arguments."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from vramplan.facts.architecture import (
    Architecture,
    Attention,
    DecoderLayer,
    Embedding,
    Experts,
    GatedMLP,
    Linear,
    Norm,
    PlainMLP,
    Role,
)
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


def attention(fields: Fields, heads: Heads, projections: tuple[Linear, ...]) -> Attention:
    """Rotary attention over whole heads; a family that differs replaces what differs."""
    return Attention(
        heads.num_heads,
        heads.num_kv_heads,
        heads.head_dim,
        projections,
        dropout=fields.fraction("attention_dropout", default=0.0),
        rotary_dim=heads.head_dim,
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


def fused_gated_mlp(hidden: int, intermediate: int, activation: str) -> GatedMLP:
    """Gate and up in one linear (Phi-3, GLM)."""
    return GatedMLP(
        intermediate,
        activation,
        (
            Linear("mlp.gate_up_proj", hidden, 2 * intermediate, bias=False, role=Role.MLP),
            Linear("mlp.down_proj", intermediate, hidden, bias=False, role=Role.MLP),
        ),
    )


def plain_mlp(hidden: int, intermediate: int, activation: str, up: str, down: str, *, bias: bool = True) -> PlainMLP:
    """Up and down projections under the family's own names."""
    return PlainMLP(
        intermediate,
        activation,
        (Linear(up, hidden, intermediate, bias, Role.MLP), Linear(down, intermediate, hidden, bias, Role.MLP)),
    )


def standard_mlp(fields: Fields, hidden: int, *, bias: bool = False) -> GatedMLP:
    """The gated MLP of ``intermediate_size`` with ``hidden_act``, SiLU by default."""
    return gated_mlp(
        hidden, fields.required_size("intermediate_size"), fields.text("hidden_act", default="silu"), bias=bias
    )


def norm_pair(hidden: int, kind: str = "rms", *, bias: bool = False) -> tuple[Norm, Norm]:
    """The two norms before attention and before the MLP."""
    return Norm("input_layernorm", hidden, kind, bias), Norm("post_attention_layernorm", hidden, kind, bias)


def sandwich_norms(hidden: int) -> tuple[Norm, ...]:
    """Gemma's four norms, before and after attention and MLP."""
    sides = ("input", "post_attention", "pre_feedforward", "post_feedforward")
    return tuple(Norm(f"{side}_layernorm", hidden, "rms_gemma") for side in sides)


def whole_multiple(fields: Fields, hidden: int, num_heads: int) -> int:
    """Width of a head where the hidden size is cut into ``num_heads`` of them.

    Raises:
        ConfigError: it does not divide.
    """
    if hidden % num_heads:
        raise fields.error("hidden_size", f"is {hidden}, no multiple of the {num_heads} heads")
    return hidden // num_heads


def routed_experts(fields: Fields, name: str, hidden: int, count: str, intermediate: str, *aliases: str) -> Experts:
    """The routed experts, their number and width in the fields of those names."""
    return Experts(name, fields.required_size(count, *aliases), hidden, fields.required_size(intermediate))


def router_scores(fields: Fields) -> str:
    """``Architecture.router_scores`` of families that balance their experts where ``output_router_logits`` is set."""
    return "balanced" if fields.flag("output_router_logits", default=False) else "dropped"


def sparse_layers(fields: Fields, num_layers: int) -> tuple[bool, ...]:
    """Which layers have experts as Qwen's configs say it: every ``decoder_sparse_step``-th but ``mlp_only_layers``."""
    step = fields.size("decoder_sparse_step", default=1)
    dense = fields.whole_numbers("mlp_only_layers")
    return tuple((index + 1) % step == 0 and index not in dense for index in range(num_layers))


def rotated_layers(fields: Fields, num_layers: int) -> tuple[bool, ...]:
    """Which layers have rotary positions: ``no_rope_layers`` (1 where they do), else all but every n-th."""
    given = fields.per_layer("no_rope_layers", num_layers)
    if given:
        return tuple(bool(item) for item in given)
    every = fields.size("no_rope_layer_interval", default=4)
    return tuple((index + 1) % every != 0 for index in range(num_layers))


def windows(fields: Fields, kinds: Sequence[str], default_window: int | None) -> tuple[int | None, ...]:
    """Each layer's sliding window: that of the config on ``sliding_attention`` layers, else none.

    ``kinds``: what the class makes of an absent ``layer_types``.
    """
    window = fields.optional_size("sliding_window", default=default_window)
    return tuple(window if kind == "sliding_attention" else None for kind in layer_kinds(fields, kinds))


def layer_kinds(fields: Fields, default: Sequence[str]) -> tuple[str, ...]:
    """``layer_types``, one a layer; ``default`` where it is absent."""
    given = fields.per_layer("layer_types", len(default))
    kinds = default if given is None else [str(kind) for kind in given]
    unknown = set(kinds) - {"full_attention", "sliding_attention", "chunked_attention"}
    if unknown:
        raise fields.error("layer_types", f"has {sorted(unknown)[0]!r}, which is no kind of attention that is known")
    return tuple(kinds)


def sliding_layers(fields: Fields, num_layers: int) -> tuple[int | None, ...]:
    """Each layer's sliding window as Qwen's configs say it: ``layer_types``, else ``max_window_layers``, else none."""
    if not fields.flag("use_sliding_window", default=False):
        return (None,) * num_layers
    first = fields.count("max_window_layers", default=28)
    kinds = ["sliding_attention" if index >= first else "full_attention" for index in range(num_layers)]
    return windows(fields, kinds, default_window=4096)


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
    default_vocab: int | None = None,
    final_norm: Norm | None = None,
) -> Architecture:
    """The frame around the layers in Llama's spelling: ``model.embed_tokens``, ``model.norm``, ``lm_head``."""
    if default_vocab is None:
        vocab = fields.required_size("vocab_size")
    else:
        vocab = fields.size("vocab_size", default=default_vocab)
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
