"""Each family builds, tensor by tensor, what the installed transformers builds from the same fields."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from vramplan.facts.architecture import Architecture, Attention, Role
from vramplan.facts.families import FAMILIES, architecture_from_config

from support.small_configs import SMALL, label


def build_both(model_type: str, fields: dict[str, Any]) -> tuple[Architecture, torch.nn.Module]:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**fields, pad_token_id=0))
    return architecture_from_config({"model_type": model_type, **fields}), model


def test_every_family_has_a_small_config():
    nested = {"gemma3", "llama4"}
    assert {model_type for model_type, _ in SMALL} == set(FAMILIES) - nested


@pytest.mark.parametrize(("model_type", "fields"), SMALL, ids=map(label, SMALL))
class TestAgainstTransformers:
    def test_tensors_have_the_same_names_shapes_and_order(self, model_type, fields):
        ours, model = build_both(model_type, fields)
        theirs = [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]
        assert [(tensor.name, tensor.shape) for tensor in ours.named_tensors()] == theirs

    def test_linears_are_the_modules_that_adapters_see(self, model_type, fields):
        ours, model = build_both(model_type, fields)
        theirs = {
            name: (module.weight.shape, module.bias is not None)
            for name, module in model.named_modules()
            if (isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D") and name != ours.head.name
        }
        sizes = {name: (torch.Size(next(linear.tensors()).shape), linear.bias) for name, linear in ours.named_linears()}
        assert sizes == theirs

    def test_roles_follow_the_kinds_of_module(self, model_type, fields):
        ours, model = build_both(model_type, fields)
        for tensor in ours.named_tensors():
            owner = model.get_submodule(tensor.name.rpartition(".")[0])
            assert tensor.role in roles_of(owner, tensor.name), tensor.name

    def test_scalars_are_those_of_the_config_class(self, model_type, fields):
        ours, model = build_both(model_type, fields)
        config = model.config
        assert ours.hidden_size == config.hidden_size
        assert ours.vocab_size == config.vocab_size
        assert ours.num_layers == config.num_hidden_layers
        assert ours.tied_embeddings == config.tie_word_embeddings
        if model_type != "bloom":  # ALiBi: its class has no number of positions
            assert ours.max_positions == config.max_position_embeddings
        dropout = getattr(config, "attention_dropout", getattr(config, "attn_pdrop", None))
        assert {layer.mixer.dropout for layer in ours.layers} == {float(dropout)}

    def test_windows_are_those_of_the_modules(self, model_type, fields):
        ours, model = build_both(model_type, fields)
        for index, layer in enumerate(ours.layers):
            module = model.get_submodule(f"{ours.layer_prefix}.{index}")
            attention = next(part for name, part in module.named_modules() if name.endswith(("attn", "attention")))
            if isinstance(layer.mixer, Attention) and hasattr(attention, "sliding_window"):
                assert layer.mixer.sliding_window == attention.sliding_window
            kinds = getattr(model.config, "layer_types", None)
            if kinds is not None and isinstance(layer.mixer, Attention):
                assert (layer.mixer.sliding_window is not None) == (kinds[index] == "sliding_attention")
                assert (layer.mixer.chunk is not None) == (kinds[index] == "chunked_attention")


SLIDING = ("gemma2", "gemma3_text", "gpt_oss", "mistral", "qwen2", "qwen2_moe", "qwen3", "smollm3")


@pytest.mark.parametrize("model_type", SLIDING)
def test_a_model_all_of_whose_layers_slide_makes_the_masks_that_its_code_makes(model_type, monkeypatch):
    """Several families make the mask of layers that see everything whether or not there are any."""
    fields = dict(next(fields for name, fields in SMALL if name == model_type))
    fields |= {"sliding_window": 16, "use_sliding_window": True}
    if model_type != "mistral":
        fields["layer_types"] = ["sliding_attention"] * fields["num_hidden_layers"]
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**fields, pad_token_id=0))
    code, made = importlib.import_module(type(model).__module__), set()
    for kind in ("create_causal_mask", "create_sliding_window_causal_mask"):
        monkeypatch.setattr(code, kind, lambda kind=kind, **_: made.add(kind))
    model(torch.zeros(1, 8, dtype=torch.long))
    ours = architecture_from_config({"model_type": model_type, **fields})
    assert all(layer.mixer.local_window for layer in ours.layers)
    assert ours.both_masks == ("create_causal_mask" in made)


def roles_of(owner: torch.nn.Module, name: str) -> set[Role]:
    """Roles that a parameter of this module may have, by the module's class and the parameter's path."""
    kind = type(owner).__name__
    if "Embedding" in kind or "project_" in name:
        return {Role.EMBEDDING}
    if "Norm" in kind:
        return {Role.NORM}
    if "Router" in kind or "shared_expert_gate" in name:
        return {Role.ROUTER}
    if "Experts" in kind:
        return {Role.EXPERTS}
    if name.startswith("lm_head"):
        return {Role.HEAD}
    return {Role.ATTENTION} if "attn" in name or "attention" in name else {Role.MLP}


@pytest.mark.parametrize(("outer", "inner"), [("gemma3", "gemma3_text"), ("llama4", "llama4_text")])
def test_a_model_for_images_is_read_by_its_text_part(outer, inner):
    fields = next(fields for model_type, fields in SMALL if model_type == inner)
    whole = {"model_type": outer, "text_config": fields, "vision_config": {"hidden_size": 8}}
    alone = architecture_from_config({"model_type": inner, **fields})
    assert list(architecture_from_config(whole).named_tensors()) == list(alone.named_tensors())


def test_layers_of_one_kind_are_one_object():
    fields = next(fields for model_type, fields in SMALL if model_type == "gemma3_text")
    architecture = architecture_from_config({"model_type": "gemma3_text", **fields})
    assert len({id(layer) for layer in architecture.layers}) == 2
