"""fit_run: whether a run fits, the ledger that says so, and what would make it fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vramplan.cost.work import trainable_numel
from vramplan.facts.architecture import Architecture
from vramplan.facts.device import Node
from vramplan.memory.ledger import Estimate
from vramplan.search.choose import search
from vramplan.search.plan import Plan
from vramplan.search.planner import plan_of
from vramplan.search.room import MARGIN_FRAC
from vramplan.spec.run import RunSpec

if TYPE_CHECKING:
    from vramplan.search.remedy import Remedy


@dataclass(frozen=True, slots=True)
class Fit:
    """The answer of ``vramplan fit``."""

    asked: RunSpec
    """As the user gave it."""
    plan: Plan
    """The fastest candidate that fits; where none does, the one with the fewest bytes."""
    estimate: Estimate
    """Of the plan's run."""
    num_params: int
    """Of the model, adapters aside."""
    num_trained: int
    remedies: tuple[Remedy, ...]
    """What would make it fit; empty where it does."""
    uncovered: tuple[str, ...] = ()
    """Why ways that the search has were not tried, where none fits: their bytes are not counted."""

    @property
    def fits(self) -> bool:
        return self.estimate.fits

    @property
    def tight(self) -> bool:
        """Whether it fits without the planner's margin only."""
        return self.fits and self.plan.margin_frac == 0


def fit_run(run: RunSpec, node: Node, architecture: Architecture, margin_frac: float = MARGIN_FRAC) -> Fit:
    """Searches what ``run`` leaves open and says whether it fits on ``node``.

    Raises:
        NoPlanError: no candidate can be made; the text says which number to change.
        LegalityError: what the user fixed is a combination that DeepSpeed refuses.
    """
    answer = search(run, node, architecture, margin_frac)
    plan = plan_of(answer, node)
    ways = () if answer.fits else _remedies(run, node, architecture)
    num_trained = trainable_numel(run, architecture)
    return Fit(run, plan, answer.estimate, architecture.num_params, num_trained, ways, answer.uncovered)


def _remedies(run: RunSpec, node: Node, architecture: Architecture) -> tuple[Remedy, ...]:
    from vramplan.search.remedy import remedies

    return remedies(run, node, architecture)
