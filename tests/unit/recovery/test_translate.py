"""What a PEFT model says of itself, as our method; what we cannot say is refused, not left out."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from vramplan.memory.estimate import UncoveredError
from vramplan.recovery.translate import _checkpointing, _loss_and_kernels, _method, _zero

CONFIG = LlamaConfig(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    vocab_size=64,
)


def adapted(**fields):
    return get_peft_model(LlamaForCausalLM(CONFIG), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **fields))


def test_plain_adapters_are_understood():
    method = _method(adapted(lora_dropout=0.1, use_rslora=True))
    assert (method.kind, method.r, method.dropout, method.use_rslora) == ("lora", 4, 0.1, True)
    assert method.target_modules == ("q_proj", "v_proj")


@pytest.mark.parametrize(
    "fields",
    [
        {"modules_to_save": ["lm_head"]},
        {"layers_to_transform": [0]},
        {"rank_pattern": {"q_proj": 8}},
        {"bias": "lora_only"},
        {"exclude_modules": ["layers.0.self_attn.q_proj"]},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_adapters_that_hold_more_or_less_are_refused(fields):
    with pytest.raises(UncoveredError, match=next(iter(fields))):
        _method(adapted(**fields))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, ("hf", "hf")),
        ({"loss_type": "nll"}, ("hf", "hf")),
        ({"use_liger_kernel": True}, ("liger", "liger")),
        ({"use_liger_kernel": True, "loss_type": None}, ("liger", "liger")),
        ({"use_liger_kernel": True, "liger_kernel_config": {"fused_linear_cross_entropy": False}}, ("hf", "liger")),
        (
            {"use_liger_kernel": True, "liger_kernel_config": {"rope": False, "rms_norm": False, "swiglu": False}},
            ("liger", "hf"),
        ),
    ],
)
def test_a_trainers_loss_and_kernels_are_ours(arguments, expected):
    found = _loss_and_kernels(SimpleNamespace(**arguments), LlamaForCausalLM(CONFIG))
    assert (found["loss"], found["kernels"]) == expected


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"loss_type": None}, "loss_type chunked_nll"),
        ({"loss_type": "dft"}, "loss_type dft"),
        ({"use_liger_kernel": True, "liger_kernel_config": {"cross_entropy": True}}, "cross_entropy"),
        ({"use_liger_kernel": True, "liger_kernel_config": {"rope": False}}, "some of liger's kernels"),
    ],
)
def test_a_loss_that_is_not_counted_is_refused_by_its_name(arguments, said):
    with pytest.raises(UncoveredError, match=said):
        _loss_and_kernels(SimpleNamespace(**arguments), LlamaForCausalLM(CONFIG))


@pytest.mark.parametrize(
    ("keywords", "every", "reentrant"),
    [
        (None, 1, False),
        ({"every_n_layers": 2}, 2, False),
        ({"use_reentrant": True}, 1, True),
        ({"use_reentrant": False, "preserve_rng_state": False}, 1, False),
        ({"preserve_rng_state": False}, 1, True),  # torch's own default
    ],
)
def test_checkpointing_is_what_transformers_makes_of_the_keywords(keywords, every, reentrant):
    args = SimpleNamespace(gradient_checkpointing=True, gradient_checkpointing_kwargs=keywords)
    found = _checkpointing(args)
    assert (found["checkpoint_every"], found["checkpoint_reentrant"]) == (every, reentrant)


def test_inputs_in_pinned_memory_are_refused():
    args = SimpleNamespace(gradient_checkpointing=True, gradient_checkpointing_kwargs={"offload": True})
    with pytest.raises(UncoveredError, match="offload"):
        _checkpointing(args)


def zero(**section):
    return _zero(SimpleNamespace(deepspeed_plugin=SimpleNamespace(deepspeed_config={"zero_optimization": section})))


def test_deepspeeds_section_is_read_with_all_its_names():
    found = zero(
        stage=3,
        zero_hpz_partition_size=2,
        reduce_bucket_size="auto",
        stage3_gather_fp16_weights_on_model_save=True,
        zero_quantized_weights=False,
        offload_optimizer={"device": "cpu", "pin_memory": True, "buffer_count": 4},
    )
    expected = {"stage": 3, "hpz_partition_size": 2, "offload_optimizer": "cpu", "offload_param": "none"}
    assert found == expected


@pytest.mark.parametrize(
    "section", [{"zero_quantized_weights": True}, {"offload_optimizer": {"device": "cpu", "ratio": 0.5}}]
)
def test_zero_keys_that_are_not_counted_are_refused(section):
    with pytest.raises(UncoveredError, match=next(iter(section))):
        zero(**section)
