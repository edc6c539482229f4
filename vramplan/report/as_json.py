"""Reports as plain values for ``--json``."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from vramplan.memory.ledger import Band, Estimate
from vramplan.memory.term import Moment
from vramplan.report import words
from vramplan.search.fit import Fit
from vramplan.search.plan import Plan, Refusal, term_to_dict


def fit_to_dict(fit: Fit) -> dict[str, Any]:
    """The answer of ``vramplan fit --json``."""
    return {
        "fits": fit.fits,
        "verdict": words.verdict(fit),
        "model": fit.asked.model,
        "params_total": fit.num_params,
        "params_trainable": fit.num_trained,
        **estimate_to_dict(fit.estimate),
        "plan": plan_summary(fit.plan),
        "remedies": [
            {
                "changes": dict(way.changes),
                "text": words.remedy_text(way),
                "used_peak_bytes_per_rank": way.used_peak_bytes,
                "changes_training": way.changes_training,
            }
            for way in fit.remedies
        ],
        "refused": [refusal_to_dict(refusal) for refusal in fit.plan.refused],
    }


def estimate_to_dict(found: Estimate) -> dict[str, Any]:
    """Bytes of one rank at the peak, its terms (they add up to the used bytes), moments and phases."""
    return {
        "peak_phase": found.peak.phase.value,
        "peak_moment": found.peak.name,
        "allocated_peak_bytes_per_rank": found.allocated_peak_bytes,
        "used_peak_bytes_per_rank": found.used_peak_bytes,
        "reserved_band_bytes": _band(found.reserved_band),
        "used_band_bytes": _band(found.used_band),
        "capacity_bytes": found.capacity_bytes,
        "host_bytes_per_node": found.host_bytes_per_node,
        "pinned_host_bytes_per_node": found.pinned_bytes_per_node,
        "host_capacity_bytes": found.host_capacity_bytes,
        "terms": [term_to_dict(term) for term in (*found.peak.terms, *found.overhead)],
        "host_terms": [term_to_dict(term) for term in found.host_terms],
        "disk_bytes_per_node": found.disk_bytes_per_node,
        "disk_terms": [term_to_dict(term) for term in found.disk_terms],
        "moments": [_moment(moment) for moment in found.moments],
        "phases": [asdict(phase) for phase in found.phases],
        "assumptions": [
            {"name": term.name, "basis": term.basis.value, "note": term.note} for term in words.uncertain_terms(found)
        ],
    }


def _band(band: Band | None) -> list[int] | None:
    """The least and the most that a reading of the driver or the allocator may be."""
    return None if band is None else [band.low_bytes, band.high_bytes]


def plan_summary(plan: Plan) -> dict[str, Any]:
    """What the planner decided, with the spec that says it in full."""
    run = plan.run
    return {
        "micro_batch_size": run.micro_batch_size,
        "grad_accum_steps": run.grad_accum_steps,
        "global_batch_size": run.global_batch_size,
        "zero_stage": run.zero.stage,
        "offload_optimizer": run.zero.offload_optimizer,
        "offload_param": run.zero.offload_param,
        "activation_checkpointing": run.activation_checkpointing,
        "world_size": plan.node.world_size,
        "device": plan.node.device.name,
        "step_time_s": plan.prediction.step_time_s,
        "tokens_per_s": plan.prediction.tokens_per_s,
        "margin_frac": plan.margin_frac,
        "run": run.model_dump(mode="json", exclude_none=True),
    }


def plan_to_dict(plan: Plan) -> dict[str, Any]:
    """The answer of ``vramplan plan --json``: the summary, and plan.yaml as it stands."""
    return {"plan": plan_summary(plan), "plan_file": plan.to_dict()}


def refusal_to_dict(refusal: Refusal) -> dict[str, Any]:
    """A refused candidate, flat."""
    return {
        **asdict(refusal.candidate),
        "step_time_s": refusal.step_time_s,
        "tokens_per_s": refusal.tokens_per_s,
        "used_peak_bytes_per_rank": refusal.used_peak_bytes,
        "peak_moment": refusal.peak_moment,
        "reason": refusal.reason,
    }


def _moment(moment: Moment) -> dict[str, Any]:
    return {
        "name": moment.name,
        "phase": moment.phase.value,
        "first_step": moment.first_step,
        "allocated_bytes": moment.num_bytes,
        "terms": [term_to_dict(term) for term in moment.terms],
    }
