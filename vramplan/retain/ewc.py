"""Elastic weight consolidation (Kirkpatrick et al. 2017, arXiv 1612.00796, equation 3).

The diagonal of a language model is so uneven that the springs as they stand do harm: in SmolLM2-135M a hundredth of the
elements holds nearly nine tenths of the sum and the stiffest is millions of times the mean, so that one step later the
penalty is all that clipping leaves of the gradient. So it is cut at a multiple of its mean (``max_stiffness``).
"""

from __future__ import annotations

import torch


def ewc_penalty(distance: torch.Tensor, fisher: torch.Tensor, weight: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(penalty, its gradient) for weights at ``distance`` (theta - theta_0) from the start; ``fisher`` has its shape.

    ``weight / 2 * sum(fisher * distance ** 2)`` and ``weight * fisher * distance``.
    """
    pull = weight * fisher * distance
    return 0.5 * (pull * distance).sum(), pull


def fisher_of(gradients: list[torch.Tensor]) -> torch.Tensor:
    """The diagonal of the empirical Fisher matrix: the mean square of each sample's gradient of its loss.

    (Martens 2014, arXiv 1412.1193, section 11: the labels of the data stand for samples of the model's distribution.)
    """
    return torch.stack([grad.float().square() for grad in gradients]).mean(0)
