"""The loss of a global batch: the mean negative log-likelihood of its target tokens, whoever computed them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from vramplan.data.batch import IGNORED, Batch
from vramplan.errors import LegalityError


def batch_loss(
    model: Any,
    batch: Batch,
    target_weight: float,
    *,
    divides_sum: bool,
    extra: Callable[[torch.Tensor], torch.Tensor] | None = None,
    row_losses: torch.Tensor | None = None,
) -> torch.Tensor:
    """This micro-batch's part of the loss: sum of its tokens' (weighted) negative log-likelihood / ``target_weight``.

    With ``target_weight`` the sum of the global batch's weights (its number of targets where they weigh 1), parts add
    up over micro-batches and ranks to the mean over all its tokens, so neither changes the loss. ``divides_sum``: what
    ``takes_num_targets`` says of the model. ``extra``: what is added to it, from the logits. ``row_losses`` (batch):
    filled, for a batch with weights, with each sequence's mean negative log-likelihood, unweighted. The model's output,
    and with it the logits, is let go on return.
    """
    inputs = batch.inputs()
    if batch.weights is not None:
        output = model(**inputs)
        nll = token_nll(output.logits, batch)
        loss: torch.Tensor = (nll * batch.weights).sum() / target_weight
        if row_losses is not None:
            row_losses.copy_(nll.detach().sum(1) / _targets_of_rows(batch).clamp(min=1))
    elif divides_sum:
        # transformers divides the sum by this instead of taking a mean (loss/loss_utils.py, fixed_cross_entropy)
        output = model(**inputs, labels=batch.labels, num_items_in_batch=target_weight, **_next_labels(batch))
        loss = output.loss
    elif batch.next_labels is not None:
        raise LegalityError(
            f"layout.sp: the loss of {type(model).__name__} shifts labels by itself and so cannot take stretches of "
            "sequences: set sp 1"
        )
    else:
        output = model(**inputs, labels=batch.labels)
        loss = output.loss * (batch.labels[:, 1:] != IGNORED).sum() / target_weight
    return loss if extra is None else loss + extra(output.logits)


def token_nll(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Negative log-likelihood of each target (batch, length), fp32, where the batch's weights lie (at the target's own
    place, in a stretch of sequences at that which predicts it); 0 where there is none.

    In fp32 and with the labels shifted instead of the logits, as transformers' loss (loss/loss_utils.py), so it takes
    the same memory.
    """
    nll = torch.nn.functional.cross_entropy(
        logits.float().flatten(0, 1), batch.predicted().flatten(), ignore_index=IGNORED, reduction="none"
    ).view(batch.labels.shape)
    return nll if batch.next_labels is not None else torch.nn.functional.pad(nll, (1, 0))[:, :-1]


def _next_labels(batch: Batch) -> dict[str, torch.Tensor]:
    """What keeps transformers' loss (and liger's) from shifting the labels of a stretch."""
    return {} if batch.next_labels is None else {"shift_labels": batch.next_labels}


def _targets_of_rows(batch: Batch) -> torch.Tensor:
    """(batch,): the sum over a sequence's stretches of what is divided by them is its mean."""
    if batch.targets_of_rows is not None:
        return batch.targets_of_rows
    return (batch.labels[:, 1:] != IGNORED).sum(1)


def takes_num_targets(module: Any) -> bool:
    """Whether the model's own loss takes the number of tokens to divide by (asked as transformers' Trainer asks)."""
    base = module.get_base_model() if hasattr(module, "get_base_model") else module  # PEFT's wrapper passes it on
    if hasattr(base, "accepts_loss_kwargs"):
        return bool(base.accepts_loss_kwargs)
    parameters = inspect.signature(base.forward).parameters.values()
    return any(parameter.kind == inspect.Parameter.VAR_KEYWORD for parameter in parameters)
