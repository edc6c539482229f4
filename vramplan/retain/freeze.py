"""Freezing by pattern, by last blocks, or all but new blocks (Howard and Ruder 2018, arXiv 1801.06146).

A parameter that is not trained keeps its value: what it holds of general knowledge cannot be lost.
"""

from __future__ import annotations

from typing import Any

from vramplan.spec.trainable import FullMethod, check_trains


def freeze(module: Any, method: FullMethod) -> None:
    """Parameters that ``method`` does not train need no gradient from now on.

    Raises:
        SpecError: as ``check_trains``.
    """
    num_layers = module.config.get_text_config().num_hidden_layers
    check_trains(method, (name for name, _ in module.named_parameters()), num_layers)
    for name, param in module.named_parameters():
        param.requires_grad_(method.trains(name, num_layers))
