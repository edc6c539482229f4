"""FLOP of a token against the numbers that the papers use."""

from __future__ import annotations

import pytest

from vramplan.cost.work import adapter_numel, token_work, trainable_numel, training_flops
from vramplan.errors import VramplanError
from vramplan.facts.catalogue import all_models
from vramplan.facts.families import architecture_from_config
from vramplan.facts.resolve import resolve_architecture
from vramplan.spec.run import RunSpec


def ask(**fields: object) -> RunSpec:
    return RunSpec.model_validate({"model": "meta-llama/Llama-3.1-8B", "seq_len": 4096, **fields})


def test_training_takes_six_flops_a_weight_and_token_besides_attention():
    run = ask()
    architecture = resolve_architecture(run)
    flops = training_flops(token_work(run, architecture), full=True, checkpointing=False)
    embedding = architecture.embeddings[0].num_embeddings * architecture.hidden_size
    assert flops.matmul == pytest.approx(6 * (architecture.num_params - embedding), rel=1e-4)


def test_attention_grows_with_the_sequence_and_is_halved_by_causal_kernels():
    architecture = resolve_architecture(ask())
    short, long = (token_work(ask(seq_len=length), architecture) for length in (1024, 4096))
    assert long.attention_flops == 4 * short.attention_flops
    eager = token_work(ask(attention="eager"), architecture)
    assert eager.attention_flops == 2 * long.attention_flops
    # 4 s h FLOP a layer and token for all pairs (Kaplan et al. 2020 count 2 n_ctx d for one of the two products)
    assert eager.attention_flops == 4 * 4096 * 4096 * architecture.num_layers


def test_checkpointing_adds_one_forward_of_the_layers():
    run = ask()
    work = token_work(run, resolve_architecture(run))
    kept = training_flops(work, full=True, checkpointing=False)
    recomputed = training_flops(work, full=True, checkpointing=True)
    assert recomputed.matmul - kept.matmul == work.layer_flops
    assert recomputed.attention - kept.attention == work.attention_flops


def test_frozen_weights_need_no_gradient_of_their_own():
    run = ask(method={"kind": "lora", "r": 16})
    work = token_work(run, resolve_architecture(run))
    full = training_flops(work, full=True, checkpointing=False)
    adapters = training_flops(work, full=False, checkpointing=False)
    assert adapters.matmul < full.matmul * 0.7
    assert adapters.matmul > full.matmul * 2 / 3


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        # PEFT's print_trainable_parameters() for Llama-3-8B: 3,407,872 for q, v at r 8; 41,943,040 for all at r 16
        ({"r": 8, "target_modules": ("q_proj", "v_proj")}, 3_407_872),
        ({"r": 16}, 41_943_040),
        ({"r": 8, "target_modules": r".*\.(q|v)_proj"}, 3_407_872),
        ({"r": 8, "target_modules": ("no_such_module",)}, 0),
    ],
)
def test_adapters_have_as_many_elements_as_peft_makes(method, expected):
    run = ask(method={"kind": "lora", **method})
    assert adapter_numel(run, resolve_architecture(run)) == expected


def test_full_training_updates_every_parameter():
    run = ask()
    assert trainable_numel(run, resolve_architecture(run)) == 8_030_261_248


@pytest.mark.parametrize(
    ("model", "active"),
    [
        # published active parameters, embedding and head included: 12.9 B (Mixtral paper, arXiv 2401.04088, section 1),
        # 3.3 B (Qwen3-30B-A3B model card), 37 B (DeepSeek-V3, arXiv 2412.19437, abstract)
        ("mistralai/Mixtral-8x7B-v0.1", 12.9e9),
        ("Qwen/Qwen3-30B-A3B", 3.3e9),
        ("deepseek-ai/DeepSeek-V3", 37e9),
    ],
)
def test_of_experts_only_those_that_a_token_is_sent_to_are_counted(model: str, active: float):
    run = ask(model=model, seq_len=128)
    architecture = resolve_architecture(run)
    work = token_work(run, architecture)
    embedding = architecture.vocab_size * architecture.hidden_size
    assert (work.layer_flops + work.head_flops) / 2 + embedding == pytest.approx(active, rel=0.03)


def test_every_catalogued_model_has_a_cost():
    counted = 0
    for entry in all_models():
        try:
            architecture = architecture_from_config(entry.config)
        except VramplanError:
            continue  # a family that the catalogue has and the calculator does not
        counted += 1
        work = token_work(ask(model=entry.name, seq_len=64), architecture)
        # two FLOP a weight, experts that idle aside, embeddings not counted
        assert 0.02 < work.forward_flops / architecture.num_params < 2.3, entry.name
    assert counted > 100
