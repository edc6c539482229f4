"""What DeepSeek-V2 and -V3 share: latent attention, and routed experts beside shared ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from vramplan.facts.architecture import LatentAttention, Linear, MixtureOfExperts, Norm, Role, Router
from vramplan.facts.families.fields import Fields
from vramplan.facts.families.parts import gated_mlp, routed_experts

DEFAULT_Q_RANK = 1536
DEFAULT_KV_RANK = 512
DEFAULT_NOPE_HEAD_DIM = 128
DEFAULT_ROPE_HEAD_DIM = 64
DEFAULT_V_HEAD_DIM = 128


def latent_attention(fields: Fields, hidden: int, rotary: str) -> LatentAttention:
    """Queries through a narrow projection (unless ``q_lora_rank`` is null), keys and values through another."""
    attention = LatentAttention(
        num_heads=fields.required_size("num_attention_heads"),
        q_rank=fields.optional_size("q_lora_rank", default=DEFAULT_Q_RANK),
        kv_rank=fields.size("kv_lora_rank", default=DEFAULT_KV_RANK),
        nope_head_dim=fields.size("qk_nope_head_dim", default=DEFAULT_NOPE_HEAD_DIM),
        rotary_dim=fields.size("qk_rope_head_dim", default=DEFAULT_ROPE_HEAD_DIM),
        v_head_dim=fields.size("v_head_dim", default=DEFAULT_V_HEAD_DIM),
        parts=(),
        dropout=fields.fraction("attention_dropout", default=0.0),
        rotary=rotary,
    )
    return replace(attention, parts=tuple(_parts(attention, hidden, fields.flag("attention_bias", default=False))))


def _parts(attention: LatentAttention, hidden: int, bias: bool) -> Iterator[Linear | Norm]:
    """The projections and their norms, in registration order."""
    heads, q_rank, kv_rank = attention.num_heads, attention.q_rank, attention.kv_rank
    q_width = heads * attention.qk_head_dim
    if q_rank is None:
        yield _linear("q_proj", hidden, q_width)
    else:
        yield _linear("q_a_proj", hidden, q_rank, bias)
        yield Norm("self_attn.q_a_layernorm", q_rank)
        yield _linear("q_b_proj", q_rank, q_width)
    yield _linear("kv_a_proj_with_mqa", hidden, kv_rank + attention.rotary_dim, bias)
    yield Norm("self_attn.kv_a_layernorm", kv_rank)
    yield _linear("kv_b_proj", kv_rank, heads * (attention.nope_head_dim + attention.v_head_dim))
    yield _linear("o_proj", heads * attention.v_head_dim, hidden, bias)


def _linear(name: str, fan_in: int, fan_out: int, bias: bool = False) -> Linear:
    return Linear(f"self_attn.{name}", fan_in, fan_out, bias, Role.ATTENTION)


def mixture_with_shared(
    fields: Fields,
    hidden: int,
    *,
    scoring: str,
    default_shared: int,
    default_groups: tuple[int, int] = (1, 1),
    bias: bool = False,
) -> MixtureOfExperts:
    """Routed experts and, as one MLP, ``n_shared_experts`` shared ones.

    ``default_groups``: how many groups of experts there are, and how many a token's experts are taken from.
    """
    activation = fields.text("hidden_act", default="silu")
    experts = routed_experts(fields, "mlp.experts", hidden, "n_routed_experts", "moe_intermediate_size")
    shared_width = experts.intermediate * fields.size("n_shared_experts", default=default_shared)
    return MixtureOfExperts(
        fields.required_size("num_experts_per_tok"),
        activation,
        (
            experts,
            Router("mlp.gate", hidden, experts.num_experts),
            gated_mlp(hidden, shared_width, activation, bias=bias, prefix="mlp.shared_experts"),
        ),
        scoring=scoring,
        normalises=scoring == "sigmoid_of_groups" and fields.flag("norm_topk_prob", default=True),
        num_groups=fields.optional_size("n_group", default=default_groups[0]) or 1,
        groups_per_token=fields.optional_size("topk_group", default=default_groups[1]) or 1,
    )
