"""The targets of adapters on models with experts, against PEFT itself on models without bytes."""

import warnings

import pytest

from vramplan.errors import SpecError
from vramplan.facts.families import architecture_from_config
from vramplan.spec.targets import resolve_targets, saved_modules
from vramplan.spec.trainable import LoraMethod

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 4}
SMALL |= {"num_hidden_layers": 2, "vocab_size": 61, "moe_intermediate_size": 16, "num_experts_per_tok": 2}
CONFIGS = {
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {"num_experts": 4, "shared_expert_intermediate_size": 24},
    "qwen3_moe": {"num_experts": 4, "head_dim": 8},
    "deepseek_v3": {
        "n_routed_experts": 4,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
    },
    "llama": {},
}
TARGETS = ["all-linear", ("q_proj", "o_proj", "kv_b_proj"), r".*\.self_attn\..*_proj", r".*1\.mlp\..*_proj"]


def adapted_by_peft(config, targets):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = dict(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(fields.pop("model_type"), **fields))
    lora = LoraConfig(target_modules=targets if isinstance(targets, str) else list(targets), task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a rank is for nothing
        wrapped = get_peft_model(model, lora)
    owners = {
        name.removeprefix("base_model.model.") for name, part in wrapped.named_modules() if hasattr(part, "lora_A")
    }
    ours = {"gate.weight": "router", "gate_up_proj": "gate_up_proj:2"}
    parameters = frozenset(ours.get(name, name) for name in lora.target_parameters or ())
    return {name for name in owners if not name.endswith(("mlp.experts", "mlp.gate", ".base_layer"))}, parameters


@pytest.mark.parametrize("family", list(CONFIGS))
def test_targets_are_those_of_peft(family):
    config = {"model_type": family, **SMALL, **CONFIGS[family]}
    architecture = architecture_from_config(config)
    for targets in TARGETS[:3] if family == "mixtral" else TARGETS:  # no linear of Mixtral's is one of the fourth
        found = resolve_targets(LoraMethod(target_modules=targets), architecture)
        linears = {name for name, _ in architecture.named_linears() if found.method.adapts(name)}
        assert (linears, found.parameters) == adapted_by_peft(config, targets), targets


def test_a_part_of_what_is_fused_is_refused():
    architecture = architecture_from_config({"model_type": "qwen3_moe", **SMALL, **CONFIGS["qwen3_moe"]})
    with pytest.raises(SpecError, match="gate_proj and up_proj"):
        resolve_targets(LoraMethod(target_modules=("q_proj", "gate_proj")), architecture)


def test_parameters_are_named_by_their_endings():
    architecture = architecture_from_config({"model_type": "qwen2_moe", **SMALL, **CONFIGS["qwen2_moe"]})
    method = LoraMethod(target_modules=("q_proj",), target_parameters=("experts.gate_up_proj", "gate.weight"))
    assert resolve_targets(method, architecture).parameters == {"gate_up_proj", "router"}
    with pytest.raises(SpecError, match="is the ending of no router's"):
        resolve_targets(LoraMethod(target_parameters=("q_proj.weight",)), architecture)
    converted = architecture_from_config({"model_type": "qwen3_moe", **SMALL, **CONFIGS["qwen3_moe"]})
    with pytest.raises(SpecError, match="in target_modules instead"):
        resolve_targets(method, converted)


def test_a_matrix_that_head_and_table_share_is_saved_once_whichever_is_named():
    tied = architecture_from_config({"model_type": "llama", **SMALL, "tie_word_embeddings": True})
    apart = architecture_from_config({"model_type": "llama", **SMALL, "tie_word_embeddings": False})
    for name in ("embed_tokens", "model.embed_tokens", "lm_head"):
        assert list(saved_modules(LoraMethod(modules_to_save=(name,)), tied)) == ["model.embed_tokens"]
    both = LoraMethod(modules_to_save=("embed_tokens", "lm_head"))
    assert list(saved_modules(both, apart)) == ["model.embed_tokens", "lm_head"]
    assert saved_modules(LoraMethod(), apart) == {}


@pytest.mark.parametrize(
    ("config", "method", "said"),
    [
        ({"model_type": "llama", **SMALL}, {"modules_to_save": ("norm",)}, "neither the token table"),
        ({"model_type": "llama", **SMALL}, {"modules_to_save": ("tokens",)}, "neither the token table"),
        (
            {"model_type": "llama", **SMALL},
            {"modules_to_save": ("embed_tokens",), "target_modules": ("q_proj", "embed_tokens")},
            "name it in one of them",
        ),
        (
            {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 61},
            {"modules_to_save": ("wte",)},
            "PEFT would part",
        ),
    ],
)
def test_other_modules_are_not_saved_whole(config, method, said):
    with pytest.raises(SpecError, match=said):
        saved_modules(LoraMethod(**method), architecture_from_config(config))


def test_a_model_without_experts_has_none_to_adapt():
    method = LoraMethod(target_parameters=("experts.gate_up_proj",))
    with pytest.raises(SpecError, match="llama has no routed experts"):
        resolve_targets(method, architecture_from_config({"model_type": "llama", **SMALL}))
