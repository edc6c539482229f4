"""Which modules the threshold takes whole, against DeepSpeed's own functions on models without bytes."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
from deepspeed.utils import get_z3_leaf_modules
from transformers import AutoConfig, AutoModelForCausalLM

from vramplan.facts.families import architecture_from_config
from vramplan.memory.granularity import leaves

from support.small_configs import SMALL

LARGEST = 1 << 40


def leaves_of_deepspeed(model: torch.nn.Module, threshold: int) -> set[str]:
    for module in model.modules():
        module._z3_leaf = False
    engine = SimpleNamespace(
        min_granularity_value=sys.maxsize, min_granularity_layer=None, granularity_info=set(), z3_leaf_layers=[]
    )
    for name in ("_get_granularity_recursively", "_set_leaf_by_threshold_preorder"):
        setattr(engine, name, getattr(DeepSpeedZeRoOffload, name).__get__(engine))
    engine._get_granularity_recursively(model)  # both as _set_z3_leaf_modules_by_threshold calls them
    if engine.min_granularity_value <= threshold:
        engine._set_leaf_by_threshold_preorder(model, threshold)
    taken = {id(module) for module in get_z3_leaf_modules(model)}
    return {name for name, module in model.named_modules() if id(module) in taken}


@pytest.mark.parametrize(("family", "fields"), SMALL, ids=[f"{family}-{n}" for n, (family, _) in enumerate(SMALL)])
def test_what_is_taken_whole_is_what_deepspeed_takes(family, fields):
    config = {"model_type": family, "pad_token_id": 0, **fields}
    architecture = architecture_from_config(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    for param in model.parameters():
        param.ds_numel = param.numel()
    layers = {f"{architecture.layer_prefix}.{index}" for index in range(architecture.num_layers)}
    threshold, seen = 1, set()
    while threshold < architecture.num_params:
        found = leaves_of_deepspeed(model, threshold)
        expected = "none" if not found else "layers" if found == layers else "other"
        assert leaves(architecture, threshold) == expected, (threshold, sorted(found)[:4])
        seen.add(expected)
        threshold = threshold * 5 // 4 + 1
    assert len(seen) > 1
