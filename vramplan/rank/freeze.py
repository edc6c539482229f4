"""Freezing by pattern, by last blocks, or all but new blocks (Howard and Ruder 2018, arXiv 1801.06146)."""

from __future__ import annotations

from typing import Any

from vramplan.errors import SpecError
from vramplan.spec.trainable import FullMethod


def freeze(module: Any, method: FullMethod) -> None:
    """Parameters that ``method`` does not train need no gradient from now on.

    Raises:
        SpecError: nothing is left to train, or there are fewer blocks than ``train_last_blocks``.
    """
    num_layers = module.config.get_text_config().num_hidden_layers
    if method.train_last_blocks is not None and method.train_last_blocks > num_layers:
        raise SpecError(
            f"method.train_last_blocks {method.train_last_blocks} is more than the {num_layers} blocks: lower it"
        )
    for name, param in module.named_parameters():
        param.requires_grad_(method.trains(name, num_layers))
    if not any(param.requires_grad for param in module.parameters()):
        raise SpecError(f"method.freeze {list(method.freeze)} leaves nothing to train: take a pattern out")
