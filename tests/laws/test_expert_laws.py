"""What must hold of blocks with routed experts beside dense ones."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.small_configs import FEW_KV
from vramplan.facts.architecture import Architecture
from vramplan.facts.dtype import Dtype
from vramplan.facts.families import architecture_from_config
from vramplan.memory.model_run import ModelRun
from vramplan.memory.profile import profile
from vramplan.memory.size import sub
from vramplan.spec.trainable import FullMethod

heads = st.integers(1, 8)
intermediates = st.integers(1, 40).map(lambda n: 8 * n)
BOOKKEEPING = {
    "fp32 softmax over the one expert": 4,
    "number of the best expert": 8,
    "its weight before it was divided, and the sum": 4 + 4,
    "rows in the experts' order, and which tokens they are": 8 + 8,
    "weights in that order": 2,
    "whether a row belongs to no expert": 1,
    "rows in the tokens' order": 8,
}
"""Bytes a token that routing keeps for backward in bf16, whatever the widths."""
HELD_FOR_BACKWARD_OF_WEIGHTS = 2
"""Hidden states a row that experts keep and a dense MLP does not: the gathered input (a dense one shares the norm's
output, which the router keeps here) and the output before it is weighed."""


def build(family: str, hidden: int, intermediate: int, layers: int) -> Architecture:
    sizes = {**FEW_KV, "head_dim": 16, "hidden_size": hidden, "num_hidden_layers": layers}
    experts = {"num_experts": 1, "num_experts_per_tok": 1, "moe_intermediate_size": intermediate}
    fields = {**sizes, "intermediate_size": intermediate, "norm_topk_prob": True, **experts}
    return architecture_from_config({"model_type": family, **fields})


def kept(architecture: Architecture) -> tuple[int, ...]:
    run = ModelRun(architecture, FullMethod(), Dtype.BF16, None, "cuda", "sdpa", checkpointing=False, keep_outputs=True)
    return profile(run).forward_end.total


@settings(max_examples=25, deadline=None)
@given(heads, intermediates, st.integers(1, 3))
def test_one_expert_has_the_parameters_of_a_dense_mlp_and_a_router(num_heads, intermediate, layers):
    hidden = 16 * num_heads
    dense, expert = (build(family, hidden, intermediate, layers) for family in ("qwen3", "qwen3_moe"))
    assert expert.num_params == dense.num_params + layers * hidden


@settings(max_examples=25, deadline=None)
@given(heads, intermediates, st.integers(1, 3))
def test_one_expert_keeps_what_a_dense_mlp_keeps_and_the_routing(num_heads, intermediate, layers):
    """Exact: two hidden states and a constant number of bytes a token, one number an expert; nothing of it grows with
    the width of the expert."""
    hidden = 16 * num_heads
    dense, expert = (build(family, hidden, intermediate, layers) for family in ("qwen3", "qwen3_moe"))
    more = sub(kept(expert), kept(dense))
    a_token = HELD_FOR_BACKWARD_OF_WEIGHTS * hidden * 2 + sum(BOOKKEEPING.values())
    assert more == (layers * 4, layers * a_token, 0, 0, 0)


@settings(max_examples=25, deadline=None)
@given(heads, intermediates, st.integers(1, 4), st.integers(2, 64))
def test_more_experts_of_which_a_token_meets_as_many_keep_only_more_scores(num_heads, intermediate, chosen, times):
    """What a layer keeps does not grow with the number of experts, but for the router's softmax and an offset each."""
    hidden = 16 * num_heads
    few = build("qwen3_moe", hidden, intermediate, 1)
    layer = few.layers[0]

    def with_experts(count: int) -> Architecture:
        block = layer.feed_forward
        parts = tuple(
            replace(part, num_experts=count) if hasattr(part, "num_experts") else part for part in block.parts
        )
        wider = replace(block, parts=parts, experts_per_token=chosen)
        swapped = tuple(wider if part is block else part for part in layer.parts)
        return replace(few, layers=(replace(layer, parts=swapped),))

    more = sub(kept(with_experts(chosen * times)), kept(with_experts(chosen)))
    added = chosen * times - chosen
    assert more == (4 * added, 4 * added, 0, 0, 0)
