"""Recovery from out-of-memory for other trainers: what ended a run, which plan to take next, and two drop-ins.

- ``verdict_of`` says of an exception that a training loop caught what ended the step (``Verdict``, ``Cause``), and
  ``next_plan`` which plan to take then, given every ``Attempt`` (``attempt_of``) so far;
- ``classify`` says the same from all that is known of an ended run of several ranks (``Evidence``), and ``Ladder`` is
  what ``next_plan`` asks;
- ``find_executable_batch_size`` stands in for accelerate's and keeps the global batch;
- ``FitCallback`` for transformers' Trainer (and TRL's) asks before training whether it fits, and writes down what was
  predicted beside what was measured.

Importing it imports no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vramplan.measure.marker import Marker, MemoryState, is_out_of_memory
from vramplan.recovery.batch_size import find_executable_batch_size
from vramplan.recovery.failures import attempt_of, next_plan, verdict_of
from vramplan.search.lower import Lowered
from vramplan.supervise.attempts import Attempt
from vramplan.supervise.classify import Cause, Evidence, RankState, Verdict, classify
from vramplan.supervise.ladder import Exhausted, Ladder

if TYPE_CHECKING:
    from vramplan.recovery.trainer import FitCallback

__all__ = [
    "Attempt",
    "Cause",
    "Evidence",
    "Exhausted",
    "FitCallback",
    "Ladder",
    "Lowered",
    "Marker",
    "MemoryState",
    "RankState",
    "Verdict",
    "attempt_of",
    "classify",
    "find_executable_batch_size",
    "is_out_of_memory",
    "next_plan",
    "verdict_of",
]


def __getattr__(name: str) -> Any:
    if name == "FitCallback":  # its base class is transformers'
        from vramplan.recovery.trainer import FitCallback

        return FitCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
