"""A config that cannot be read says which field and which family file; nothing is guessed or run."""

from __future__ import annotations

from typing import Any

import pytest

from vramplan.errors import ConfigError, UnknownNameError
from vramplan.facts.families import architecture_from_config

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 128,
}


@pytest.mark.parametrize("field", sorted(set(LLAMA) - {"model_type"}))
def test_a_missing_size_is_named_with_the_family_file(field):
    config = {name: value for name, value in LLAMA.items() if name != field}
    with pytest.raises(ConfigError, match=rf"'{field}' is missing .*families/llama\.py"):
        architecture_from_config(config)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("hidden_size", "64", "whole number"),
        ("hidden_size", 65, "no multiple of num_attention_heads = 4"),
        ("num_key_value_heads", 3, "no multiple of num_key_value_heads = 3"),
        ("num_key_value_heads", True, "whole number"),
        ("num_hidden_layers", 0, "positive"),
        ("attention_dropout", 1.5, "between 0 and 1"),
        ("mlp_bias", 1, "true or false"),
        ("hidden_act", 3, "must be a string"),
        ("tie_word_embeddings", "yes", "true or false"),
        ("head_dim", 33, "33 rotated elements, which do not pair up"),
        ("pad_token_id", 128, "is 128, but the vocabulary ends at 127"),
        ("rope_scaling", {"type": "spiral", "factor": 2.0}, "has the type 'spiral', which is none of default, linear"),
        ("rope_parameters", {"full_attention": {"rope_type": "spiral"}}, "'rope_parameters' has the type 'spiral'"),
        ("quantization_config", "gptq", "must be an object"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_wrong(field, value, said):
    with pytest.raises(ConfigError, match=said):
        architecture_from_config({**LLAMA, field: value})


@pytest.mark.parametrize(
    "fields",
    [
        {"pad_token_id": -1},
        {"pad_token_id": None},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_scaling": False},
        {"model_type": "gpt_neox", "hidden_size": 384, "rotary_pct": 0.2},
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "pad_token_id": 50257},
    ],
    ids=str,
)
def test_what_transformers_builds_is_not_refused(fields):
    architecture_from_config({**LLAMA, **fields})


def test_what_the_weights_are_packed_with_is_read():
    assert architecture_from_config(LLAMA).stored_quantization == ""
    packed = {**LLAMA, "quantization_config": {"quant_method": "awq", "bits": 4}}
    assert architecture_from_config(packed).stored_quantization == "awq"
    nested = {
        "model_type": "gemma3",
        "text_config": {**LLAMA, "head_dim": 16, "quantization_config": packed["quantization_config"]},
    }
    assert architecture_from_config(nested).stored_quantization == "awq"
    eight = {**LLAMA, "quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}
    assert architecture_from_config(eight).stored_quantization == "bitsandbytes, 8 bits"
    for nothing in ({}, {"quant_method": "bitsandbytes", "load_in_4bit": False, "load_in_8bit": False}):
        assert architecture_from_config({**LLAMA, "quantization_config": nothing}).stored_quantization == ""
    older = {**LLAMA, "quantization_config": {"load_in_4bit": True}}
    assert architecture_from_config(older).stored_quantization == "bitsandbytes"


def test_a_token_has_no_more_experts_than_a_layer():
    config = {
        **LLAMA,
        "model_type": "mixtral",
        "num_key_value_heads": 2,
        "num_local_experts": 2,
        "num_experts_per_tok": 3,
    }
    with pytest.raises(ConfigError, match="'num_experts_per_tok' is 3, more than the 2 experts of a layer"):
        architecture_from_config(config)


def test_two_spellings_of_one_field_must_agree():
    config = {"model_type": "gpt2", "n_embd": 64, "hidden_size": 32, "n_layer": 1, "n_head": 2, "vocab_size": 8}
    with pytest.raises(ConfigError, match="'n_embd' is 64 but 'hidden_size' is 32"):
        architecture_from_config(config)


def test_layer_types_must_name_each_layer():
    config = {**LLAMA, "model_type": "qwen2", "num_key_value_heads": 2, "use_sliding_window": True}
    with pytest.raises(ConfigError, match="each of the 2 layers, not 1"):
        architecture_from_config({**config, "layer_types": ["full_attention"]})
    with pytest.raises(ConfigError, match="'linear_attention'"):
        architecture_from_config({**config, "layer_types": ["full_attention", "linear_attention"]})


def test_an_unknown_family_names_the_nearest():
    with pytest.raises(UnknownNameError, match="'lama'; did you mean llama"):
        architecture_from_config({**LLAMA, "model_type": "lama"})


def test_a_config_without_a_model_type_says_so():
    with pytest.raises(ConfigError, match="no field 'model_type'"):
        architecture_from_config({"hidden_size": 64})


@pytest.mark.parametrize(
    "config", [{"model_type": "new", "auto_map": {"AutoModel": "code.Model"}}, {"model_type": "baichuan"}]
)
def test_a_model_with_its_own_code_says_that_it_is_not_run(config):
    with pytest.raises(ConfigError, match="never run to read facts: `vramplan simulate"):
        architecture_from_config(config)


def test_a_model_for_images_without_a_text_part_says_so():
    with pytest.raises(ConfigError, match="'text_config' is missing"):
        architecture_from_config({"model_type": "gemma3", "vision_config": {}})
