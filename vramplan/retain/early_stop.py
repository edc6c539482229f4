"""Early stopping on a retention metric: perplexity of general text against what it was before training.

(Early stopping: Prechelt 1998, "Early stopping - but when?"; here the watched set is what must not be forgotten.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def should_stop(losses: Sequence[float], max_rise_frac: float, patience: int) -> bool:
    """Whether the last ``patience`` losses (in nats; the first of all is before training) all mean a perplexity more
    than ``1 + max_rise_frac`` times the first: ``exp(loss - losses[0]) > 1 + max_rise_frac``."""
    after = losses[1:]
    if len(after) < patience:
        return False
    return all(loss - losses[0] > math.log1p(max_rise_frac) for loss in after[-patience:])
