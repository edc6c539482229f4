"""What would fit but changes the training: listed with its cost, and done only where the user allowed it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

from vramplan.errors import VramplanError
from vramplan.facts.architecture import Architecture
from vramplan.facts.device import Node
from vramplan.search.plan import Plan
from vramplan.search.planner import make_plan
from vramplan.search.remedy import PLANNED_FIELDS, applied, remedies, with_field, with_open
from vramplan.spec.run import RunSpec
from vramplan.units import format_bytes, format_seconds

ALLOWABLE = ("seq_len", "method", "optimizer")
"""What ``--allow`` takes: shorter sequences, adapters instead of full weights, an optimizer with smaller states."""


@dataclass(frozen=True, slots=True)
class Offer:
    """One way on that changes what is learnt."""

    changes: tuple[tuple[str, Any], ...]
    plan: Plan

    @property
    def needs(self) -> frozenset[str]:
        """Which of ``ALLOWABLE`` it takes."""
        return frozenset(name.partition(".")[0] for name, _ in self.changes)

    def __str__(self) -> str:
        what = " and ".join(f"{name} {value}" for name, value in self.changes)
        costs = self.plan.prediction
        return (
            f"{what} ({format_bytes(costs.used_peak_bytes)}, about {format_seconds(costs.step_time_s)} a step; "
            f"--allow {' --allow '.join(sorted(self.needs))})"
        )


def offers(plan: Plan, architecture: Architecture, room_bytes: int) -> tuple[Offer, ...]:
    """Plans that fit into ``room_bytes`` and train something else than ``plan``, the fastest first.

    What a device needs beyond tensors is counted to the room, which leaves a little more than has to be.
    """
    run = with_open(plan.run, PLANNED_FIELDS)
    node = replace(plan.node, memory_cap_bytes=max(1, room_bytes))
    found = [
        Offer(way.changes, replace(made, node=plan.node, versions=plan.versions))
        for way in remedies(run, node, architecture)
        if way.changes_training and (made := _made(_changed(run, node, way.changes), node, architecture)) is not None
    ]
    return tuple(sorted(found, key=lambda offer: offer.plan.prediction.step_time_s))


def _made(run: RunSpec, node: Node, architecture: Architecture) -> Plan | None:
    """The fastest plan of those whose tensors, with what the device needs beyond them, stay within the room."""
    try:
        return make_plan(run, node, architecture)
    except VramplanError:  # by the leanest candidate it fits, but not with the planner's margin
        return None


def first_allowed(every: tuple[Offer, ...], allowed: Collection[str]) -> Offer | None:
    """The fastest that needs no more than what is allowed."""
    return next((offer for offer in every if offer.needs <= set(allowed)), None)


def _changed(run: RunSpec, node: Node, changes: tuple[tuple[str, Any], ...]) -> RunSpec:
    changed, _ = applied(run, node, changes)  # none of these changes the node
    if run.method.kind == "full" and changed.method.kind != "full":
        # the rate of full training is too low for adapters: that of the method follows
        return with_field(changed, "optimizer.lr", None)
    return changed
