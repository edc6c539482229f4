"""What a PEFT model says of itself, as our method; what we cannot say is refused, not left out."""

from __future__ import annotations

import pytest
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from vramplan.memory.estimate import UncoveredError
from vramplan.recovery.translate import _method

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
