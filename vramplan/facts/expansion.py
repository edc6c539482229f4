"""Block expansion: where LLaMA-Pro's new blocks stand (Wu et al. 2024, arXiv 2401.02415, section 3.2)."""

from __future__ import annotations

from dataclasses import replace

from vramplan.errors import SpecError
from vramplan.facts.architecture import Architecture


def new_block_positions(num_layers: int, num_new: int) -> tuple[int, ...]:
    """Indices, in the expanded model, of ``num_new`` blocks added to ``num_layers``.

    The old blocks are cut into ``num_new`` groups, as equal as can be; a new block follows each.

    Raises:
        SpecError: there are more new blocks than old ones.
    """
    if num_new > num_layers:
        raise SpecError(f"method.new_blocks {num_new} is more than the {num_layers} blocks of the model: lower it")
    return tuple(round(group * num_layers / num_new) + group - 1 for group in range(1, num_new + 1))


def expand_architecture(architecture: Architecture, num_new: int) -> Architecture:
    """The architecture with ``num_new`` more blocks, each like the one before it."""
    if not num_new:
        return architecture
    layers = list(architecture.layers)
    for position in new_block_positions(len(layers), num_new):
        layers.insert(position, layers[position - 1])
    return replace(architecture, layers=tuple(layers))
