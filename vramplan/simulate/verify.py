"""The planner's choice held to a simulation; what the simulation refuses sends the planner on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vramplan.errors import NoPlanError, SimulationError
from vramplan.facts.architecture import Architecture
from vramplan.facts.device import Node
from vramplan.search.choose import search
from vramplan.search.plan import Plan
from vramplan.search.planner import make_plan, plan_of
from vramplan.search.space import Candidate
from vramplan.simulate.asked import request_on
from vramplan.simulate.request import Conditions, Simulator
from vramplan.simulate.result import SimulationResult
from vramplan.spec.run import RunSpec
from vramplan.units import format_bytes

MAX_TRIALS = 8
"""Plans simulated before giving up: each refusal is a bug of the arithmetic, and many of them are not to be hidden."""


@dataclass(frozen=True, slots=True)
class Verified:
    """A plan, and what its simulation says."""

    plan: Plan
    found: SimulationResult

    @property
    def text(self) -> str:
        """One clause."""
        if self.found.error is not None:
            return f"not verified: {self.found.error}"
        of = f"{format_bytes(self.found.used_peak_bytes)} of {format_bytes(self.found.capacity_bytes or 0)}"
        if self.found.failure is not None:
            return refusal_text(self.found)
        return f"verified by simulation: {of} used at its peak ({self.found.peak.phase})"

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "fits": self.found.fits,
            "text": self.text,
            "used_peak_bytes": self.found.used_peak_bytes,
            "allocated_peak_bytes": self.found.allocated_peak_bytes,
            "peak_phase": self.found.peak.phase,
        }


def verify_plan(plan: Plan) -> Verified:
    """Simulates a plan as it stands."""
    with Simulator() as simulator:
        return _verify(plan, simulator)


def make_verified_plan(run: RunSpec, node: Node, architecture: Architecture) -> Verified:
    """The fastest plan that fits, by the arithmetic and by a simulation.

    Raises:
        NoPlanError: none fits by the arithmetic, or the simulation refuses every one.
        LegalityError: what the user fixed is a combination that DeepSpeed refuses.
    """
    refused: dict[Candidate, str] = {}
    with Simulator() as simulator:
        verified = _verify(make_plan(run, node, architecture), simulator)
        while verified.found.fits is False:
            refused[candidate_of(verified.plan.run)] = refusal_text(verified.found)
            answer = search(run, node, architecture, excluded=refused)
            if not answer.fits or len(refused) == MAX_TRIALS:
                raise NoPlanError(f"no plan fits by simulation; the last one tried: {refusal_text(verified.found)}")
            verified = _verify(plan_of(answer, node), simulator)
    return verified


def candidate_of(run: RunSpec) -> Candidate:
    """The choices of a closed run."""
    return Candidate(
        micro_batch_size=run.micro_batch_size or 1,
        grad_accum_steps=run.grad_accum_steps or 1,
        zero_stage=run.zero.stage or 0,
        offload_optimizer=run.zero.offload_optimizer or "none",
        offload_param=run.zero.offload_param or "none",
        activation_checkpointing=run.activation_checkpointing or "none",
    )


def refusal_text(found: SimulationResult) -> str:
    """One clause: the first allocation that fails in the simulation, or the peak that is too high."""
    capacity = format_bytes(found.capacity_bytes or 0)
    if found.failure is None:
        used = format_bytes(found.used_peak_bytes)
        return f"simulated, {found.peak.phase} uses {used} of the {capacity} that each rank may use"
    failure = found.failure
    return (
        f"simulated, {failure.phase} fails to allocate {format_bytes(failure.num_bytes)} beside "
        f"{format_bytes(failure.reserved_bytes)} reserved and {format_bytes(found.overhead_bytes)} of the driver's, "
        f"of {capacity}"
    )


def _verify(plan: Plan, simulator: Simulator) -> Verified:
    request = request_on(plan.run, plan.node, Conditions())
    ((_, found),) = simulator.run([request])
    if not found.phases:
        raise SimulationError(found.error or "nothing was traced")
    return Verified(plan, found)
