"""What a PEFT model says of itself, as our method; what we cannot say is refused, not left out."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from vramplan.memory.estimate import UncoveredError
from vramplan.recovery.translate import _loss_and_kernels, _method

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
