"""The learning rate of each layer (discriminative fine-tuning; Howard and Ruder 2018, arXiv 1801.06146, sec. 3.2)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from vramplan.spec.trainable import block_of


def rate_share(name: str, num_layers: int, decay: float) -> float:
    """The share of the peak rate that a parameter gets: ``decay ** depth``.

    Depth 0 is the last block with the final norm and an untied head, ``num_layers - 1`` the first block,
    ``num_layers`` the embeddings (all else that is registered outside the blocks).
    """
    block = block_of(name)
    if block is not None:
        return float(decay ** (num_layers - 1 - block))
    return 1.0 if _is_at_the_end(name) else float(decay**num_layers)


def rate_groups(named_params: Iterable[tuple[str, Any]], num_layers: int, decay: float) -> list[dict[str, Any]]:
    """Optimizer groups of parameters with an equal share, which stands under ``lr_share``; the highest first."""
    by_share: dict[float, list[Any]] = {}
    for name, param in named_params:
        by_share.setdefault(rate_share(name, num_layers, decay), []).append(param)
    return [{"params": params, "lr_share": share} for share, params in sorted(by_share.items(), reverse=True)]


def _is_at_the_end(name: str) -> bool:
    return any(part in name for part in ("lm_head", "embed_out", "final_layer_norm", "ln_f", ".norm."))
