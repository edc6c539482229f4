"""Parameter counts of real models equal those that transformers counts, in all and by kind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vramplan.facts.architecture import Architecture, Role
from vramplan.facts.catalogue import find_model
from vramplan.facts.families import architecture_from_config

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "param_counts.json").read_text())["models"]


def architecture(name: str) -> Architecture:
    return architecture_from_config(find_model(name).config)


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda golden: golden["name"])
def test_count_is_exact(golden):
    assert architecture(golden["name"]).num_params == golden["params_total"]


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda golden: golden["name"])
def test_count_by_kind_is_exact(golden):
    model = architecture(golden["name"])
    embedding = sum(tensor.numel for table in model.embeddings for tensor in table.tensors())
    linear = sum(part.weight_numel for _, part in model.named_linears())
    head = 0 if model.tied_embeddings else model.head.weight_numel
    experts = model.params_by_role[Role.EXPERTS]
    kinds = {"embedding": embedding, "lm_head": head, "linear": linear, "experts_fused": experts}
    rest = model.num_params - sum(kinds.values())
    assert {**kinds, "norm_bias_other": rest, "vision": 0} == golden["breakdown"]


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda golden: golden["name"])
def test_roles_add_up(golden):
    model = architecture(golden["name"])
    assert sum(model.params_by_role.values()) == model.num_params


def test_there_are_127_of_them():
    assert len({golden["name"] for golden in GOLDEN}) == 127


def test_llama_3_1_8b_by_role():
    counts = architecture("meta-llama/Llama-3.1-8B").params_by_role
    width, layers, vocab = 4096, 32, 128_256
    assert counts == {
        Role.EMBEDDING: vocab * width,
        Role.ATTENTION: layers * (2 * width * width + 2 * width * 1024),
        Role.MLP: layers * 3 * width * 14_336,
        Role.EXPERTS: 0,
        Role.ROUTER: 0,
        Role.NORM: (2 * layers + 1) * width,
        Role.HEAD: vocab * width,
    }


def test_gpt3_is_the_paper_s_175_billion():
    """12 n d^2 of Table 2.1's sizes, embeddings and biases: 174.6 B, which the paper rounds to 175.0 B."""
    model = architecture("openai/gpt3-175b")
    width, layers = 12_288, 96
    assert model.num_params == 12 * layers * width**2 + 13 * layers * width + (50_257 + 2048 + 2) * width
    assert round(model.num_params / 1e9) == 175
