"""Block expansion: new blocks that at first change nothing (LLaMA-Pro, Wu et al. 2024, arXiv 2401.02415, section 3.2).

A pre-norm block adds what its attention and its feed-forward write to the residual stream; a copy whose two output
projections are zero adds nothing. It is done to the files of the model, so that every ZeRO stage loads the result.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vramplan.errors import ConfigError
from vramplan.facts.expansion import DERIVED, block_sources, expand_config, new_block_positions

_BLOCK = re.compile(r"^((?:\w+\.)*(?:layers|h)\.)(\d+)(\..*)$")
WRITERS = ("self_attn.o_proj", "mlp.down_proj", "attn.c_proj", "mlp.c_proj", "self_attn.dense", "mlp.fc2")
"""Modules of a block that write to the residual stream, in the families that transformers names this way."""


def expand_state(state: Mapping[str, torch.Tensor], num_layers: int, num_new: int) -> dict[str, torch.Tensor]:
    """A state dict with ``num_new`` blocks more; tensors of old blocks are shared, not copied."""
    source = block_sources(num_layers, num_new)
    expanded = {}
    for name, tensor in state.items():
        found = _BLOCK.match(name)
        if found is None:
            expanded[name] = tensor
            continue
        for index, (old, is_new) in enumerate(source):
            if old != int(found.group(2)):
                continue
            writes = is_new and found.group(3).rpartition(".")[0].lstrip(".") in WRITERS
            fresh = torch.zeros_like(tensor) if writes else tensor.clone() if is_new else tensor
            expanded[f"{found.group(1)}{index}{found.group(3)}"] = fresh
    return expanded


def expand_model_directory(directory: Path, target: Path, num_new: int) -> None:
    """Writes the expanded model's ``config.json`` and safetensors to ``target``; other files are linked.

    Raises:
        ConfigError: the family's blocks are not known by name.
    """
    from safetensors.torch import load_file, save_file

    fields = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    num_layers = int(fields.get("n_layer", fields.get("num_hidden_layers")))
    changed = expand_config({**fields, **_layer_lists(fields)}, num_new)
    num_zeroed = 0
    for path in sorted(directory.iterdir()):
        if path.suffix == ".safetensors":
            state = expand_state(load_file(path), num_layers, num_new)
            num_zeroed += _num_writers(state, num_layers, num_new)
            save_file(state, target / path.name, metadata={"format": "pt"})
        elif path.name == "config.json":
            (target / path.name).write_text(json.dumps(changed, indent=2) + "\n", encoding="utf-8")
        elif path.is_file() and not path.name.endswith(".index.json"):
            (target / path.name).symlink_to(path.resolve())
    if num_zeroed != 2 * num_new:
        raise ConfigError(
            f"method.new_blocks: the output projections of {fields.get('model_type')} blocks are not known by name, "
            "so a new block would not start as one that changes nothing; use another method"
        )
    _write_index(target)


def _layer_lists(fields: Mapping[str, Any]) -> dict[str, Any]:
    """What transformers derives from a block's index, written out, so that old blocks stay of their kind."""
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if fields.get("model_type") not in CONFIG_MAPPING:
        return {}
    resolved = AutoConfig.for_model(**fields).to_dict()
    return {name: resolved[name] for name in DERIVED if resolved.get(name) is not None}


def _num_writers(state: Mapping[str, torch.Tensor], num_layers: int, num_new: int) -> int:
    new = new_block_positions(num_layers, num_new)
    found = (_BLOCK.match(name) for name in state)
    return sum(
        each is not None and int(each.group(2)) in new and each.group(3)[1:].removesuffix(".weight") in WRITERS
        for each in found
    )


def _write_index(target: Path) -> None:
    """The index that ``from_pretrained`` reads where there is more than one file."""
    from safetensors import safe_open

    files = sorted(target.glob("*.safetensors"))
    if len(files) == 1 and files[0].name == "model.safetensors":
        return
    where: dict[str, str] = {}
    for path in files:
        with safe_open(path, framework="pt") as opened:
            where |= dict.fromkeys(opened.keys(), path.name)
    content = {"metadata": {}, "weight_map": where}
    (target / "model.safetensors.index.json").write_text(json.dumps(content) + "\n", encoding="utf-8")
