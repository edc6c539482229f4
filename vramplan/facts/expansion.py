"""Block expansion: where LLaMA-Pro's new blocks stand (Wu et al. 2024, arXiv 2401.02415, section 3.2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from vramplan.errors import SpecError
from vramplan.facts.architecture import Architecture

PER_LAYER = ("layer_types", "no_rope_layers", "mlp_layer_types")
"""Fields of ``config.json`` with one entry a block."""
BY_INDEX = ("mlp_only_layers", "moe_layers")
"""Fields that list blocks by their indices (Qwen's dense ones; Llama-4's with experts)."""
DERIVED = (*PER_LAYER, *BY_INDEX, "first_k_dense_replace", "decoder_sparse_step")
"""Fields by which a block's kind depends on its index."""


def new_block_positions(num_layers: int, num_new: int) -> tuple[int, ...]:
    """Indices, in the expanded model, of ``num_new`` blocks added to ``num_layers``.

    The old blocks are cut into ``num_new`` groups, as equal as can be; a new block follows each.

    Raises:
        SpecError: there are more new blocks than old ones.
    """
    if num_new > num_layers:
        raise SpecError(f"method.new_blocks {num_new} is more than the {num_layers} blocks of the model: lower it")
    return tuple(round(group * num_layers / num_new) + group - 1 for group in range(1, num_new + 1))


def block_sources(num_layers: int, num_new: int) -> list[tuple[int, bool]]:
    """For each block of the expanded model the old block that it comes from, and whether it is new."""
    source = [(index, False) for index in range(num_layers)]
    for position in new_block_positions(num_layers, num_new):
        source.insert(position, (source[position - 1][0], True))
    return source


def expand_config(fields: Mapping[str, Any], num_new: int) -> dict[str, Any]:
    """The fields of ``config.json`` for the expanded model; a new block is of the kind of the one that it copies.

    What transformers derives from a block's index must stand in ``fields`` (``DERIVED``).
    """
    name = "n_layer" if "n_layer" in fields else "num_hidden_layers"
    source = block_sources(int(fields[name]), num_new)
    changed = {**fields, name: len(source)}
    for each in PER_LAYER:
        if isinstance(fields.get(each), list):
            changed[each] = [fields[each][old] for old, _ in source]
    for each in BY_INDEX:
        if isinstance(fields.get(each), list):
            changed[each] = [new for new, (old, _) in enumerate(source) if old in fields[each]]
    if fields.get("first_k_dense_replace"):
        changed["first_k_dense_replace"] = sum(old < fields["first_k_dense_replace"] for old, _ in source)
    step = fields.get("decoder_sparse_step") or 1
    if step > 1:  # of the expanded blocks no longer every so many: the dense ones are listed
        dense = [new for new, (old, _) in enumerate(source) if (old + 1) % step]
        changed["mlp_only_layers"] = sorted({*dense, *(changed.get("mlp_only_layers") or ())})
        changed["decoder_sparse_step"] = 1
    return changed


def expand_architecture(architecture: Architecture, num_new: int) -> Architecture:
    """The architecture with ``num_new`` more blocks, each like the one before it."""
    if not num_new:
        return architecture
    layers = list(architecture.layers)
    for position in new_block_positions(len(layers), num_new):
        layers.insert(position, layers[position - 1])
    return replace(architecture, layers=tuple(layers))
