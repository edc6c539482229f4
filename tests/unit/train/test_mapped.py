"""Weights left in a mapped file: copied where others are taken out of it, so that the file goes."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from vramplan.rank.optimizer import trained_groups
from vramplan.spec.run import RunSpec
from vramplan.train.mapped import free_mapped_files

from support.tiny_model import save_tiny_model


def run(stage: int, precision: str = "fp32", **fields: Any) -> RunSpec:
    return RunSpec.model_validate(
        {"model": "tiny", "seq_len": 64, "precision": precision, "zero": {"stage": stage}, **fields}
    )


@pytest.fixture(name="model")
def _model(tmp_path: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(save_tiny_model(tmp_path), dtype=torch.float32)


def in_file(model: LlamaForCausalLM) -> set[str]:
    return {name for name, param in model.named_parameters() if not param.untyped_storage().resizable()}


def mapped_bytes(path: Path) -> int:
    """Of this process' mappings of files below ``path``."""
    gc.collect()
    ranges = [
        line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines() if str(path) in line
    ]
    return sum(int(end, 16) - int(start, 16) for start, end in ranges)


def flatten(model: LlamaForCausalLM, groups: list[Any]) -> None:
    """As ZeRO 1 and 2 do."""
    for group in groups if isinstance(groups[0], dict) else [{"params": groups}]:
        flat = torch._utils._flatten_dense_tensors(group["params"]).detach()
        for param, part in zip(
            group["params"], torch._utils._unflatten_dense_tensors(flat, group["params"]), strict=True
        ):
            param.data = part


@pytest.mark.parametrize("stage", [1, 2])
def test_the_file_goes_though_frozen_weights_stay(model: LlamaForCausalLM, tmp_path: Path, stage: int):
    for param in model.model.embed_tokens.parameters():
        param.requires_grad = False
    groups = trained_groups(run(stage), model)
    assert mapped_bytes(tmp_path)
    before = model.model.embed_tokens.weight.clone()

    assert free_mapped_files(run(stage), model, groups) == 4 * before.numel()
    flatten(model, groups)

    assert mapped_bytes(tmp_path) == 0
    assert torch.equal(model.model.embed_tokens.weight, before)


def test_the_file_goes_though_one_is_alone_in_its_group(model: LlamaForCausalLM, tmp_path: Path):
    by_rate = run(2, retain={"layer_lr_decay": 0.8})
    groups = trained_groups(by_rate, model)
    assert sorted(len(group["params"]) for group in groups)[0] == 1

    assert free_mapped_files(by_rate, model, groups) > 0
    flatten(model, groups)

    assert mapped_bytes(tmp_path) == 0


@pytest.mark.parametrize(("stage", "freeze"), [(0, True), (3, True), (1, False), (2, False)])
def test_what_is_left_whole_or_taken_whole_is_not_copied(model: LlamaForCausalLM, stage: int, freeze: bool):
    model.model.embed_tokens.weight.requires_grad = not freeze
    everything = in_file(model)
    assert free_mapped_files(run(stage), model, trained_groups(run(stage), model)) == 0
    assert in_file(model) == everything


def test_sixteen_bit_training_without_zero_flattens_too(tmp_path: Path):
    save_tiny_model(tmp_path)
    LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).save_pretrained(tmp_path)
    model = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    model.model.embed_tokens.weight.requires_grad = False
    assert free_mapped_files(run(0, "bf16"), model, trained_groups(run(0), model)) > 0
    assert "model.embed_tokens.weight" not in in_file(model)


def test_a_model_that_is_frozen_under_adapters_stays_in_its_file(model: LlamaForCausalLM):
    model.requires_grad_(False)
    model.added = torch.nn.Parameter(torch.zeros(8))
    model.other = torch.nn.Parameter(torch.zeros(8))
    assert free_mapped_files(run(2), model, [model.added, model.other]) == 0


def test_what_is_not_packed_keeps_no_file_of_what_is(model: LlamaForCausalLM, tmp_path: Path):
    model.requires_grad_(False)
    for layer in model.model.layers:  # in place of the linears: what is left in the file is the token table and norms
        layer.mlp = layer.self_attn = torch.nn.Module()
    model.added = torch.nn.Parameter(torch.zeros(8))
    model.other = torch.nn.Parameter(torch.zeros(8))
    packed = run(0, "fp32", method={"kind": "qlora"})
    assert mapped_bytes(tmp_path)
    assert free_mapped_files(packed, model, [model.added, model.other]) > 0
    assert mapped_bytes(tmp_path) == 0
