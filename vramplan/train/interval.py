"""How often to write a checkpoint, so that failures cost little and writing costs little."""

from __future__ import annotations

import math

LOST_FRAC = 0.01
"""Share of the time that may be lost, on average, to work that a failure undoes."""
ASSUMED_BYTES_PER_S = 500e6
"""How fast a checkpoint is written, before one was timed. ASSUMED: a SATA disk."""


def save_interval_s(save_s: float, failure_s: float) -> float:
    """Seconds of training between checkpoints that take ``save_s``, where failures come every ``failure_s`` on average.

    Young's optimum sqrt(2 d M) (J. W. Young, CACM 17(9), 1974; first order of J. T. Daly, FGCS 22(3), 2006), but so
    often that the expected loss is at most ``LOST_FRAC``: a failure undoes half an interval T on average, which is
    T / 2M of the time, so T <= 2 M ``LOST_FRAC``.
    """
    return min(math.sqrt(2 * save_s * failure_s), 2 * failure_s * LOST_FRAC)


def save_every(step_s: float, save_s: float, failure_s: float) -> int:
    """The same in optimizer steps, at least one."""
    return max(1, int(save_interval_s(save_s, failure_s) / step_s))
