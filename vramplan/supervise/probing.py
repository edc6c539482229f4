"""``vramplan train --probe``: the worst batch is run before the real start, and what it took corrects the plan."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from vramplan.errors import NoPlanError
from vramplan.facts.architecture import Architecture
from vramplan.measure.record import PhaseReading, read_records
from vramplan.measure.run_dir import RunDir
from vramplan.memory.estimate import UncoveredError, estimate_run
from vramplan.memory.ledger import Estimate
from vramplan.search.lower import Below, changes, words_of
from vramplan.search.plan import Plan, plan_id
from vramplan.search.recalibrate import Correction, Seen, predicted_bytes
from vramplan.supervise.recover import Terms, train_to_the_end
from vramplan.supervise.supervisor import Listener
from vramplan.units import format_bytes

_MAX_PROBES = 4
_SHOWN = ("note", "recovery", "phase")
"""Events of a probe that are passed on: it has no losses worth showing."""


@dataclass(frozen=True, slots=True)
class Probed:
    """``plan``: what may be run; ``readings``: what it took in the probe, by phase."""

    plan: Plan
    readings: tuple[PhaseReading, ...]


def probe(plan: Plan, run_dir: RunDir, architecture: Architecture, listener: Listener, terms: Terms) -> Probed:
    """Probes a plan, and those that its measurements lead to, until one fits by measurement.

    Raises:
        NoPlanError: none does.
        TrainingFailed: as ``train_to_the_end``.
    """
    seen: list[Seen] = []
    for _ in range(_MAX_PROBES):
        tried = _one_probe(plan, RunDir(run_dir.root / "probe"), architecture, listener, terms)
        known = _estimate(tried.plan, architecture)
        if known is None:  # nothing was predicted, so nothing is to be corrected: it ran
            return tried
        seen += seen_in(known, tried.readings)
        correction = Correction.of(seen)
        listener({"event": "note", "text": _outcome(correction)})
        if correction.fits(known):
            return tried
        plan = next_plan(tried.plan, architecture, correction)
        text = f"the plan becomes {words_of(changes(tried.plan.run, plan.run))}"
        listener({"event": "note", "text": text, "predicted_bytes": plan.prediction.allocated_peak_bytes})
    raise NoPlanError(f"{_MAX_PROBES} plans took more than there is when they were probed: lower seq_len or the model")


def seen_in(known: Estimate, readings: tuple[PhaseReading, ...]) -> list[Seen]:
    """Measured against predicted, phase by phase. Where the driver was asked, what it counts beyond the predicted
    overhead counts as needed too."""
    beyond_tensors = known.used_peak_bytes - known.allocated_peak_bytes
    found = []
    for reading in readings:
        needed = max(reading.allocated_peak_bytes, (reading.used_peak_bytes or 0) - beyond_tensors)
        step = 1 if reading.phase.startswith("step1.") else 2
        found.append(Seen(reading.phase, needed, predicted_bytes(known, reading.phase, step)))
    return found


def next_plan(plan: Plan, architecture: Architecture, correction: Correction) -> Plan:
    """The fastest plan below ``plan`` that fits with what was seen.

    Raises:
        NoPlanError: there is none that keeps the training as it is.
    """
    tried = plan_id(plan.run)
    found = Below(plan, architecture, keep_stage=False).fastest(
        lambda run, known: plan_id(run) != tried and correction.fits(known)
    )
    if found is None:
        raise NoPlanError(
            "the probe took more than there is, and no other plan that keeps the training as it is takes less: "
            "lower seq_len, train adapters (method.kind lora), or use more devices"
        )
    return found.plan


def _one_probe(plan: Plan, probe_dir: RunDir, architecture: Architecture, listener: Listener, terms: Terms) -> Probed:
    shutil.rmtree(probe_dir.root, ignore_errors=True)
    probe_dir.root.mkdir(parents=True)
    plan.save(probe_dir.plan)
    try:
        plan = train_to_the_end(plan, probe_dir, architecture, _quieter(listener), replace(terms, probing=True))
    finally:
        shutil.rmtree(probe_dir.checkpoints, ignore_errors=True)
    (record,) = read_records(probe_dir.record)
    return Probed(plan, tuple(record.measured.phases))


def _outcome(correction: Correction) -> str:
    if not correction.beyond:
        return "probe: no phase took more than was predicted"
    most = ", ".join(f"{kind} {format_bytes(num_bytes)}" for kind, num_bytes in sorted(correction.beyond.items()))
    return f"probe: more than was predicted was taken in {most}; every prediction of these is raised by that"


def _estimate(plan: Plan, architecture: Architecture) -> Estimate | None:
    try:
        return estimate_run(plan.run, plan.node, architecture)
    except UncoveredError:
        return None


def _quieter(listener: Listener) -> Callable[[dict[str, Any]], None]:
    def pass_on(event: dict[str, Any]) -> None:
        if event["event"] in _SHOWN:
            listener(event)

    return pass_on
