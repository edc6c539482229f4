"""Layer-wise learning rates (discriminative fine-tuning, Howard and Ruder 2018, arXiv 1801.06146, section 3.2)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from vramplan.spec.rates import rate_share


def rate_groups(named_params: Iterable[tuple[str, Any]], num_layers: int, decay: float) -> list[dict[str, Any]]:
    """Optimizer groups of parameters with an equal share, which stands under ``lr_share``; the highest first."""
    by_share: dict[float, list[Any]] = {}
    for name, param in named_params:
        by_share.setdefault(rate_share(name, num_layers, decay), []).append(param)
    return [{"params": params, "lr_share": share} for share, params in sorted(by_share.items(), reverse=True)]
