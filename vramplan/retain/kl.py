"""KL divergence from the base model's next-token distribution (Li and Hoiem 2016, arXiv 1606.09282, without labels)."""

from __future__ import annotations

from typing import Any

import torch

CHUNK_TOKENS = 256
"""Tokens whose probabilities are in memory at once, in fp32."""


def kl_to_base(logits: torch.Tensor, base_logits: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """``sum over counted tokens of KL(p_base || p) = sum_v p_base(v) (log p_base(v) - log p(v))``, in nats.

    ``logits`` and ``base_logits``: (batch, length, vocabulary); ``counted``: (batch, length), bool. The gradient,
    ``p - p_base``, is made with the value, ``CHUNK_TOKENS`` tokens at a time: one tensor like ``logits`` is kept.
    """
    divergence: torch.Tensor = _KlToBase.apply(logits, base_logits, counted)  # type: ignore[no-untyped-call]
    return divergence


class _KlToBase(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, base_logits: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
        vocab_size = logits.shape[-1]
        flat, base, keep = logits.reshape(-1, vocab_size), base_logits.reshape(-1, vocab_size), counted.reshape(-1)
        grad = torch.empty_like(flat)
        total = torch.zeros((), dtype=torch.float32, device=logits.device)
        for start in range(0, len(flat), CHUNK_TOKENS):
            part = slice(start, start + CHUNK_TOKENS)
            log_p, log_base = flat[part].float().log_softmax(-1), base[part].float().log_softmax(-1)
            p_base = log_base.exp()
            each = (p_base * (log_base - log_p)).sum(-1)
            total += torch.where(keep[part], each, 0.0).sum()
            grad[part] = torch.where(keep[part, None], log_p.exp_().sub_(p_base), 0.0)
        ctx.save_for_backward(grad.view_as(logits))
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (grad,) = ctx.saved_tensors
        return grad * grads[0], None, None
