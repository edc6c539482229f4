"""The loss of a global batch: the mean negative log-likelihood of its target tokens, whoever computed them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from vramplan.data.batch import IGNORED, Batch


def batch_loss(
    model: Any,
    batch: Batch,
    num_targets: int,
    *,
    divides_sum: bool,
    extra: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """This micro-batch's part of the loss: sum of its tokens' negative log-likelihood / ``num_targets``.

    With ``num_targets`` that of the global batch, parts add up over micro-batches and ranks to the mean over all its
    tokens, so neither changes the loss. ``divides_sum``: what ``takes_num_targets`` says of the model. ``extra``: what
    is added to it, from the logits. The model's output, and with it the logits, is let go on return.
    """
    inputs = {**batch.inputs(), "labels": batch.labels}
    if divides_sum:
        # transformers divides the sum by this instead of taking a mean (loss/loss_utils.py, fixed_cross_entropy)
        output = model(**inputs, num_items_in_batch=num_targets)
        loss: torch.Tensor = output.loss
    else:
        output = model(**inputs)
        loss = output.loss * (batch.labels[:, 1:] != IGNORED).sum() / num_targets
    return loss if extra is None else loss + extra(output.logits)


def takes_num_targets(module: Any) -> bool:
    """Whether the model's own loss takes the number of tokens to divide by (asked as transformers' Trainer asks)."""
    base = module.get_base_model() if hasattr(module, "get_base_model") else module  # PEFT's wrapper passes it on
    if hasattr(base, "accepts_loss_kwargs"):
        return bool(base.accepts_loss_kwargs)
    parameters = inspect.signature(base.forward).parameters.values()
    return any(parameter.kind == inspect.Parameter.VAR_KEYWORD for parameter in parameters)
