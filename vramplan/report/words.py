"""The sentences and labels of a report: verdict, plan, remedies; the same in terminal, notebook and JSON."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

from vramplan.facts.device import Node
from vramplan.memory.ledger import Estimate
from vramplan.memory.term import Basis, Term
from vramplan.search.fit import Fit
from vramplan.search.plan import Plan
from vramplan.search.room import not_tried, why_not
from vramplan.spec.run import RunSpec
from vramplan.spec.trainable import LoraMethod
from vramplan.units import format_bytes, format_count, format_seconds

if TYPE_CHECKING:
    from vramplan.search.remedy import Remedy

_FLAGS = {
    "micro_batch_size": "--micro-batch",
    "activation_checkpointing": "--checkpointing",
    "zero.stage": "--zero",
    "loss": "--loss",
    "hardware.gpu": "--gpu",
    "hardware.gpus_per_node": "--gpus",
    "hardware.nodes": "--nodes",
    "hardware.memory_cap": "--memory-cap",
    "hardware.host_memory": "--host-memory",
    "seq_len": "--seq-len",
    "method.kind": "--method",
    "optimizer.kind": "--optimizer",
}
"""Options of ``vramplan fit`` and ``plan`` by the field of the spec that they set."""


def verdict(fit: Fit) -> str:
    """One sentence: fits or not, the moment of the peak, bytes used of bytes offered, what would make it fit."""
    found = fit.estimate
    subject = describe_run(fit.asked, fit.num_params, fit.num_trained)
    place = describe_node(fit.plan.node)
    if fit.fits:
        spare = found.capacity_bytes - found.used_peak_bytes
        room = f"{format_bytes(spare)} to spare" + (", less than the planner's margin" if fit.tight else "")
        return f"FITS: {subject} on {place}: {_peak(found)} ({room}){_host_clause(found)}."
    excess = found.used_peak_bytes - found.capacity_bytes
    shortage = f"{_peak(found)}, {format_bytes(excess)} too many" if excess > 0 else why_not(found, 0.0)
    advice = ", or with ".join(remedy_text(way) for way in fit.remedies)
    would = f"; it would fit with {advice}" if advice else "; no single change that was tried makes it fit"
    return f"DOES NOT FIT: {subject} on {place}: {shortage}{would}{not_tried(fit.uncovered)}."


def _peak(found: Estimate) -> str:
    return (
        f"its peak ({found.peak.name}) uses {format_bytes(found.used_peak_bytes)} of the "
        f"{format_bytes(found.capacity_bytes)} that each rank may use"
    )


def _host_clause(found: Estimate) -> str:
    if not found.host_bytes_per_node or found.host_capacity_bytes is not None:
        return ""
    return f", if each host has {format_bytes(found.host_bytes_per_node)} of memory to give"


def describe_run(run: RunSpec, num_params: int | None = None, num_trained: int | None = None) -> str:
    """E.g. ``meta-llama/Llama-3.1-8B (8.03 B parameters), full fine-tuning in bf16, sequences of 4,096 tokens``."""
    is_part = num_trained is not None and (num_trained != num_params or run.method.kind != "full")
    trained = f", {format_count(num_trained)} trained" if num_trained and is_part else ""
    size = f" ({format_count(num_params)} parameters{trained})" if num_params else ""
    return f"{run.model}{size}, {describe_method(run)} in {run.precision}, sequences of {run.seq_len:,} tokens"


def describe_method(run: RunSpec) -> str:
    """E.g. ``LoRA r 16``."""
    if not isinstance(run.method, LoraMethod):
        return "fine-tuning of a part" if run.method.freezes else "full fine-tuning"
    name = {"lora": "LoRA", "qlora": "QLoRA"}[run.method.kind]
    return f"{name} r {run.method.r}{' (DoRA)' if run.method.use_dora else ''}"


def describe_node(node: Node) -> str:
    """E.g. ``2 nodes of 8 x NVIDIA H100 80GB HBM3 (SXM)``."""
    devices = (
        f"{node.gpus_per_node} CPU ranks" if node.device.kind == "cpu" else f"{node.gpus_per_node} x {node.device.name}"
    )
    return devices if node.num_nodes == 1 else f"{node.num_nodes} nodes of {devices}"


def describe_layout(run: RunSpec) -> str:
    """What the planner decided, e.g. ``micro-batch 2 x 4 accumulated x 8 ranks = 64 sequences, ZeRO 2, ...``."""
    dp, sp = (run.layout.dp, run.layout.sp) if run.layout is not None else (1, 1)
    moved = (("optimizer", run.zero.offload_optimizer), ("weights", run.zero.offload_param))
    places = {"cpu": [what for what, where in moved if where == "cpu"], "nvme": []}
    places["nvme"] = [what for what, where in moved if where == "nvme"]
    named = {"cpu": "the CPU", "nvme": "NVMe"}
    said = [f"{' and '.join(whats)} on {named[place]}" for place, whats in places.items() if whats]
    offload = ", ".join(said) if said else "no offload"
    return (
        f"micro-batch {run.micro_batch_size} x {run.grad_accum_steps} accumulated x {_sharers(dp, sp)} = "
        f"{_plural(run.global_batch_size or 0, 'sequence')} a step, {_engine(run)}, "
        f"checkpointing {run.activation_checkpointing}{_every(run)}, {offload}"
    )


def _every(run: RunSpec) -> str:
    if run.activation_checkpointing != "full" or run.checkpoint_every == 1:
        return ""
    return f" (1 layer of {run.checkpoint_every})"


def _sharers(dp: int, sp: int) -> str:
    """Who share a global batch."""
    return _plural(dp, "rank") if sp == 1 else f"{_plural(dp, 'group')} of {sp} ranks that share each sequence"


def _engine(run: RunSpec) -> str:
    if run.engine == "deepspeed":
        return f"ZeRO {run.zero.stage}"
    return "plain PyTorch" if run.layout is None or run.layout.dp == 1 else "DDP"


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def describe_speed(plan: Plan) -> str:
    """The step time that ranked the plan, marked as the assumption that it is."""
    prediction = plan.prediction
    return (
        f"about {format_seconds(prediction.step_time_s)} a step, {format_count(int(prediction.tokens_per_s))} tokens/s "
        "(ASSUMED efficiencies: good for ranking only)"
    )


def remedy_text(way: Remedy) -> str:
    """The options to give, and what is used then: ``--zero 3 --checkpointing full (61.0 GiB)``."""
    parts = [part for name, value in way.changes if (part := _option(name, value))]
    offload = _offload_option(dict(way.changes))
    changed = "; changes the training" if way.changes_training else ""
    return f"{' '.join([*parts, *offload])} ({format_bytes(way.used_peak_bytes)}{changed})"


def _option(name: str, value: Any) -> str:
    if name.startswith("zero.offload_"):
        return ""
    flag = _FLAGS.get(name)
    return f"{flag} {shlex.quote(str(value))}" if flag else f"--set {shlex.quote(f'{name}={_plain(value)}')}"


def _plain(value: Any) -> str:
    """A value as ``--set`` reads it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _offload_option(changes: dict[str, Any]) -> list[str]:
    optimizer, param = changes.get("zero.offload_optimizer"), changes.get("zero.offload_param")
    if optimizer is None and param is None:
        return []
    return ["--offload " + {"cpu": "all"}.get(param or "", "optimizer" if optimizer == "cpu" else "none")]


def uncertain_terms(found: Estimate) -> list[Term]:
    """Terms of the peak, the overhead and the host that were fitted or assumed, largest first, each name once."""
    every = [*found.peak.terms, *found.overhead, *found.host_terms]
    by_name = {term.name: term for term in every if term.basis in (Basis.FITTED, Basis.ASSUMED)}
    return sorted(by_name.values(), key=lambda term: -term.num_bytes)
