"""Recovery from out-of-memory for other trainers: what ended a run, which plan to take next, and two drop-ins.

- ``classify`` says from what is known of an ended run (``Evidence``) what ended it (``Verdict``, ``Cause``);
- ``Ladder`` chooses the next plan for a run that ran out of memory, given every ``Attempt`` so far;
- ``find_executable_batch_size`` stands in for accelerate's and keeps the global batch;
- ``FitCallback`` for transformers' Trainer (and TRL's) asks before training whether it fits, and writes down what was
  predicted beside what was measured.

Importing it imports no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vramplan.measure.marker import Marker, MemoryState, is_out_of_memory
from vramplan.recovery.batch_size import find_executable_batch_size
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
    "classify",
    "find_executable_batch_size",
    "is_out_of_memory",
]


def __getattr__(name: str) -> Any:
    if name == "FitCallback":  # its base class is transformers'
        from vramplan.recovery.trainer import FitCallback

        return FitCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
