"""Every legal candidate with its step time, and which of two looks better before any bytes are counted."""

from __future__ import annotations

from dataclasses import dataclass

from vramplan.cost.step_time import CostModel
from vramplan.errors import LegalityError
from vramplan.facts.architecture import Architecture
from vramplan.facts.device import Node
from vramplan.search.legality import Illegality, illegality
from vramplan.search.space import Candidate, candidates
from vramplan.spec.run import RunSpec

TIE_FRAC = 0.02
"""Step times that differ by less are called equal: their efficiencies are assumed, so the simpler plan is better."""


@dataclass(frozen=True, slots=True)
class Priced:
    """A legal candidate, closed, with its step time."""

    candidate: Candidate
    run: RunSpec
    step_time_s: float

    @property
    def seconds_per_sequence(self) -> float:
        """What candidates are compared by: step times of different global batches do not compare."""
        return self.step_time_s / (self.run.global_batch_size or 1)

    @property
    def complexity(self) -> tuple[bool, bool, bool, int]:
        """Orders about equally fast candidates: fewer things moved, recomputed and partitioned are better."""
        candidate = self.candidate
        return (
            candidate.offload_optimizer != "none",
            candidate.offload_param != "none",
            candidate.activation_checkpointing != "none",
            candidate.zero_stage,
        )

    def looks_better_than(self, other: Priced) -> bool:
        """Whether it is faster, or simpler and about as fast."""
        if self.seconds_per_sequence < other.seconds_per_sequence:
            return True
        about_as_fast = self.seconds_per_sequence <= other.seconds_per_sequence * (1 + TIE_FRAC)
        return about_as_fast and self.complexity < other.complexity


def priced(run: RunSpec, node: Node, architecture: Architecture) -> list[Priced]:
    """Every legal candidate with its step time.

    Raises:
        LegalityError: DeepSpeed refuses every one; the text gives its reason.
    """
    cost = CostModel(run, node, architecture)
    legal: list[Priced] = []
    reasons: dict[Illegality, None] = {}
    for candidate in candidates(run, node):
        closed = candidate.close(run, node)
        reason = illegality(closed, node, architecture)
        if reason is None:
            legal.append(Priced(candidate, closed, cost.step_time(closed).total_s))
        else:
            reasons.setdefault(reason)
    if not legal:
        raise LegalityError("; ".join(f"{each.reason} ({each.source})" for each in reasons))
    return legal
