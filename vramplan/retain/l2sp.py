"""L2-SP: decay towards the starting point (Li, Grandvalet, Davoine 2018, arXiv 1802.01483, equation 3)."""

from __future__ import annotations

import torch


def l2sp_penalty(distance: torch.Tensor, weight: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(penalty, its gradient) for weights at ``distance`` (theta - theta_0, any shape) from the start.

    ``weight / 2 * sum(distance ** 2)`` and ``weight * distance``.
    """
    return 0.5 * weight * distance.square().sum(), weight * distance
