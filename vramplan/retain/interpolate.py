"""Weights between the base and the trained model (WiSE-FT, Wortsman et al. 2021, arXiv 2109.01903, equation 1)."""

from __future__ import annotations

import torch


def interpolated(trained: torch.Tensor, base: torch.Tensor, base_share: float) -> torch.Tensor:
    """``(1 - base_share) * trained + base_share * base``, in ``trained``'s format; computed in fp32 on one tensor."""
    return torch.lerp(trained.float(), base.to(trained.device).float(), base_share).to(trained.dtype)
