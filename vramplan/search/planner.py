"""make_plan: from what is asked to the plan that trains fastest among those that fit."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vramplan.errors import NoPlanError
from vramplan.facts.architecture import Architecture
from vramplan.facts.device import Node
from vramplan.search.choose import Answer, search
from vramplan.search.plan import Plan, Prediction
from vramplan.search.room import MARGIN_FRAC, not_tried, why_not
from vramplan.spec.run import RunSpec

if TYPE_CHECKING:
    from vramplan.search.remedy import Remedy


def make_plan(run: RunSpec, node: Node, architecture: Architecture, margin_frac: float = MARGIN_FRAC) -> Plan:
    """The plan of the fastest candidate that fits on ``node``.

    Raises:
        NoPlanError: none fits, or none can be made; the text says which number to change.
        LegalityError: what the user fixed is a combination that DeepSpeed refuses.
    """
    answer = search(run, node, architecture, margin_frac)
    if not answer.fits:
        from vramplan.search.remedy import remedies

        raise NoPlanError(_nothing_fits(answer, node, remedies(run, node, architecture)))
    return plan_of(answer, node)


def plan_of(answer: Answer, node: Node) -> Plan:
    """The plan that a search's best candidate makes."""
    run = answer.best.run
    prediction = Prediction.of(run, answer.estimate, answer.best.step_time_s)
    return Plan(run, node, prediction, answer.margin_frac, answer.refused)


def _nothing_fits(answer: Answer, node: Node, ways: tuple[Remedy, ...]) -> str:
    ways_text = "; or ".join(str(way) for way in ways)
    advice = f"; what would: {ways_text}" if ways_text else ""
    return (
        f"no plan fits on {node.world_size} x {node.device.name}: with {answer.best.candidate.label()}, "
        f"{why_not(answer.estimate, 0.0)}{advice}{not_tried(answer.uncovered)}"
    )
