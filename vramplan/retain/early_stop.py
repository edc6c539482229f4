"""Early stopping on a retention metric: perplexity of general text against what it was before training.

(Early stopping: Prechelt 1998, "Early stopping - but when?"; here the watched set is what must not be forgotten.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def rose_too_far(loss: float, before: float, max_rise_frac: float) -> bool:
    """Whether a loss (in nats) means a perplexity more than ``1 + max_rise_frac`` times that of ``before`` training:
    ``exp(loss - before) > 1 + max_rise_frac``."""
    return loss - before > math.log1p(max_rise_frac)


def should_stop(losses: Sequence[float], max_rise_frac: float, patience: int) -> bool:
    """Whether the last ``patience`` losses (the first of all is before training) all rose too far."""
    after = losses[1:]
    if len(after) < patience:
        return False
    return all(rose_too_far(loss, losses[0], max_rise_frac) for loss in after[-patience:])
