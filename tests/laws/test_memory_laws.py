"""What must hold of every estimate, whatever the model and the layout."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.small_configs import FEW_KV
from vramplan.facts.device import Device, Node
from vramplan.facts.families import architecture_from_config
from vramplan.memory import labels
from vramplan.memory.estimate import estimate
from vramplan.memory.ledger import Estimate
from vramplan.memory.term import Category
from vramplan.spec.layout import Layout
from vramplan.spec.run import RunSpec

GPU = Device("some GPU", "cuda", 80 * 2**30, 80 * 2**30)
DENSE = ["llama", "qwen2", "qwen3", "gemma2", "olmo2"]
WITH_HEADS = [*DENSE, "mixtral", "qwen3_moe"]
FAMILIES = [*WITH_HEADS, "deepseek_v3"]
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "moe_intermediate_size": 32, "num_experts_per_tok": 2}
EXPERTS |= {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
stages = st.sampled_from([0, 1, 2, 3])
families = st.sampled_from(FAMILIES)
checkpointings = st.sampled_from(["none", "full"])


def ask(family: str, layers: int = 3, dp: int = 4, **fields: Any) -> Estimate:
    config = {**FEW_KV, **EXPERTS, "head_dim": 16, "num_hidden_layers": layers, "model_type": family}
    closed: dict[str, Any] = {
        "micro_batch_size": 1,
        "grad_accum_steps": 1,
        "seq_len": 64,
        "zero": {"stage": 2},
        **fields,
    }
    closed.setdefault("activation_checkpointing", "none")
    closed["zero"] = {"reduce_bucket_size": 100_000, **closed["zero"]}
    run = RunSpec.model_validate({"model": "small", "layout": Layout(dp=dp), **closed})
    return estimate(run, Node(GPU, dp), architecture_from_config(config))


def peak(*arguments: Any, **fields: Any) -> int:
    return ask(*arguments, **fields).allocated_peak_bytes


@settings(max_examples=40, deadline=None)
@given(families, stages, checkpointings, st.integers(1, 8), st.integers(2, 300), st.integers(1, 4), st.integers(1, 300))
def test_bytes_never_fall_as_batch_or_sequence_rise(family, stage, checkpointing, batch, seq, more_batch, more_seq):
    def at(micro: int, seq_len: int) -> int:
        return peak(
            family,
            micro_batch_size=micro,
            seq_len=seq_len,
            zero={"stage": stage},
            activation_checkpointing=checkpointing,
        )

    assert at(batch, seq) <= at(batch + more_batch, seq) <= at(batch + more_batch, seq + more_seq)


@settings(max_examples=20, deadline=None)
@given(families, stages, checkpointings, st.integers(1, 5), st.integers(1, 3))
def test_bytes_never_fall_as_layers_rise(family, stage, checkpointing, layers, more):
    fields = {"zero": {"stage": stage}, "activation_checkpointing": checkpointing}
    assert peak(family, layers, **fields) <= peak(family, layers + more, **fields)


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(WITH_HEADS), st.sampled_from([0, 1, 2]), st.integers(1, 32), st.integers(1, 32))
def test_bytes_never_fall_as_the_rank_of_adapters_rises(family, stage, rank, more):
    small, large = ({"kind": "lora", "r": r} for r in (rank, rank + more))
    assert peak(family, method=small, zero={"stage": stage}) <= peak(family, method=large, zero={"stage": stage})


def model_states(found: Estimate) -> int:
    end = found.moments[-1]
    kept = {labels.FROZEN, labels.WEIGHTS, labels.MASTER, labels.MOMENTS}
    return sum(term.num_bytes for term in end.terms if term.name in kept)


@settings(max_examples=20, deadline=None)
@given(families, stages, st.sampled_from([1, 2, 4, 8, 16]))
def test_model_states_never_rise_with_the_number_of_ranks(family, stage, dp):
    fields = {"zero": {"stage": stage}}
    # partitions are padded to 2 elements a rank (nccl_start_alignment_factor), 12 bytes each at most in bf16
    padding = 2 * 2 * dp * 14
    assert model_states(ask(family, dp=2 * dp, **fields)) <= model_states(ask(family, dp=dp, **fields)) + padding


@settings(max_examples=30, deadline=None)
@given(families, stages, checkpointings, st.integers(1, 3), st.sampled_from(["bf16", "fp32", "bf16-autocast"]))
def test_terms_alive_at_a_moment_add_up_to_it_exactly(family, stage, checkpointing, accumulation, precision):
    found = ask(
        family,
        zero={"stage": stage},
        activation_checkpointing=checkpointing,
        grad_accum_steps=accumulation,
        precision=precision,
    )
    for moment, phase in zip(found.moments, found.phases, strict=True):
        assert sum(term.num_bytes for term in moment.terms) == phase.peak_bytes
        assert all(term.num_bytes > 0 for term in moment.terms)
    assert found.peak.num_bytes == found.allocated_peak_bytes


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(WITH_HEADS), st.sampled_from([0, 1, 2]))
def test_frozen_weights_have_no_gradients(family, stage):
    found = ask(family, method={"kind": "lora", "r": 1, "target_modules": ["q_proj"]}, zero={"stage": stage})
    adapters = 3 * (64 + 64) * 1  # three layers, one adapter of rank 1 on a 64 x 64 projection
    named = {labels.GRADIENTS, labels.GRAD_PARTITION}
    for moment in found.moments:
        held = sum(t.num_bytes for t in moment.terms if t.category is Category.GRADIENT and t.name in named)
        assert held <= adapters * 4
