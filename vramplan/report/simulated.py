"""A simulation as plain values for ``--json``, and as a report for the terminal."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from vramplan.errors import VramplanError
from vramplan.facts.resolve import resolve_architecture
from vramplan.memory.term import Basis, Category, Term
from vramplan.report import words
from vramplan.report.console import bar_text
from vramplan.report.live import live_table
from vramplan.search.plan import term_to_dict
from vramplan.simulate.asked import ClosedRun, driver_terms
from vramplan.simulate.result import Failure, SimulatedPhase, SimulationResult
from vramplan.units import format_bytes

_SPARKS = " ▁▂▃▄▅▆▇█"
SPARK_WIDTH = 80
SHOWN_LIVE = 12
"""Groups of live tensors shown in the terminal; ``--json`` has all that are kept."""


def simulation_to_dict(closed: ClosedRun, found: SimulationResult) -> dict[str, Any]:
    """The answer of ``vramplan simulate --json``: the keys of ``fit --json``, and what only a simulation knows."""
    reserved = found.reserved_peak_bytes
    return {
        "fits": found.fits,
        "verdict": verdict(closed, found),
        "model": closed.asked.model,
        "params_total": own_numel(closed, found),
        "params_trainable": found.numel_trainable,
        "peak_phase": found.peak.phase.rsplit(".", 1)[-1],
        "peak_moment": found.peak.phase,
        "allocated_peak_bytes_per_rank": found.allocated_peak_bytes,
        "reserved_peak_bytes_per_rank": reserved,
        "used_peak_bytes_per_rank": found.used_peak_bytes,
        "reserved_band_bytes": None if reserved is None else [reserved, reserved],
        "used_band_bytes": None if reserved is None else [found.used_peak_bytes, found.used_peak_bytes],
        "capacity_bytes": found.capacity_bytes,
        "host_bytes_per_node": closed.node.gpus_per_node * found.host_peak_bytes,
        "pinned_host_bytes_per_node": closed.node.gpus_per_node * found.pinned_bytes,
        "host_capacity_bytes": closed.node.host_memory_bytes,
        "terms": [term_to_dict(term) for term in terms_of(closed, found)],
        "host_terms": [],
        "disk_bytes_per_node": 0,  # offload to NVMe is not simulated
        "disk_terms": [],
        "moments": [_moment_to_dict(phase) for phase in found.phases],
        "phases": [_phase_to_dict(phase) for phase in found.phases],
        "categories": dict(found.categories),
        "largest_live": [group.to_dict() for group in found.largest_live],
        "assumptions": [
            {"name": term.name, "basis": term.basis.value, "note": term.note}
            for term in driver_terms(closed.run, closed.node)
        ],
        "plan": _plan_to_dict(closed),
        "remedies": [],
        "refused": [],
        "failure": failure_to_dict(found.failure),
        "alloc_retries": found.alloc_retries,
        "error": found.error,
        "num_blocks": found.num_blocks,
        "traced_layers": list(found.traced_layers),
        "in_full_because": found.in_full_because,
        "seconds": found.seconds,
        "host_rss_peak_bytes": found.host_rss_peak_bytes,
    }


def _moment_to_dict(phase: SimulatedPhase) -> dict[str, Any]:
    return {
        "name": phase.phase,
        "phase": phase.phase.rsplit(".", 1)[-1],
        "first_step": phase.phase.startswith("step1."),
        "allocated_bytes": phase.peak_bytes,
        "terms": [term_to_dict(_term(name, size)) for name, size in phase.categories.items()],
    }


def _phase_to_dict(phase: SimulatedPhase) -> dict[str, Any]:
    return {
        "phase": phase.phase,
        "peak_bytes": phase.peak_bytes,
        "end_bytes": phase.end_bytes,
        "reserved_peak_bytes": phase.reserved_peak_bytes,
        "host_peak_bytes": phase.host_peak_bytes,
        "pinned_bytes": phase.pinned_bytes,
        "categories": dict(phase.categories),
    }


def _plan_to_dict(closed: ClosedRun) -> dict[str, Any]:
    return {
        "micro_batch_size": closed.run.micro_batch_size,
        "grad_accum_steps": closed.run.grad_accum_steps,
        "global_batch_size": closed.run.global_batch_size,
        "zero_stage": closed.run.zero.stage,
        "offload_optimizer": closed.run.zero.offload_optimizer,
        "offload_param": closed.run.zero.offload_param,
        "activation_checkpointing": closed.run.activation_checkpointing,
        "world_size": closed.node.world_size,
        "device": closed.node.device.name,
        "run": closed.run.model_dump(mode="json", exclude_none=True),
    }


def failure_to_dict(failure: Failure | None) -> dict[str, Any] | None:
    """The first allocation that fails, with where it was asked for."""
    if failure is None:
        return None
    return {
        "phase": failure.phase,
        "bytes": failure.num_bytes,
        "allocated_bytes": failure.allocated_bytes,
        "reserved_bytes": failure.reserved_bytes,
        **{name: text for name, text in failure.birth.to_dict().items() if name != "phase"},
    }


def terms_of(closed: ClosedRun, found: SimulationResult) -> list[Term]:
    """Categories at the peak, what the allocator holds beyond them, and what the driver counts: they add up to used."""
    terms = [_term(name, size) for name, size in found.categories.items()]
    beyond = found.used_peak_bytes - found.overhead_bytes - found.allocated_peak_bytes
    if beyond:
        note = "the caching allocator's reserved bytes at their highest, less the tensors' at theirs (replayed)"
        terms.append(Term("allocator, beyond tensors", beyond, Category.OVERHEAD, Basis.DERIVED, note))
    return [*terms, *driver_terms(closed.run, closed.node)]


def title_of(closed: ClosedRun, found: SimulationResult) -> str:
    """E.g. ``Qwen/Qwen3-0.6B (596.05 M parameters), full fine-tuning in bf16, ..., on 1 x RTX 4090, simulated``."""
    run = words.describe_run(closed.run, own_numel(closed, found), found.numel_trainable)
    return f"{run} on {words.describe_node(closed.node)}, simulated"


def own_numel(closed: ClosedRun, found: SimulationResult) -> int:
    """Parameters of the model, adapters aside, as ``fit`` says them; of one that it does not know, those that were
    simulated (weights in 4 bits count as what they are packed into)."""
    try:
        return resolve_architecture(closed.asked).num_params
    except VramplanError:
        adapters = found.numel_trainable if closed.run.method.kind != "full" else 0
        return found.numel_total - adapters


def verdict(closed: ClosedRun, found: SimulationResult) -> str:
    """One sentence: fits or not, where the peak or the first failing allocation is."""
    subject = title_of(closed, found)
    if found.error is not None:
        return f"NOT KNOWN: {subject}: {found.error}."
    peak = (
        f"its peak ({found.peak.phase}) uses {format_bytes(found.used_peak_bytes)} of the "
        f"{format_bytes(found.capacity_bytes or 0)} that each rank may use"
    )
    if found.fits:
        return f"FITS: {subject}: {peak}."
    if found.failure is None:
        return f"DOES NOT FIT: {subject}: {peak}."
    failure = found.failure
    place = failure.birth.module or failure.birth.outer_frame or failure.birth.frame
    return (
        f"DOES NOT FIT: {subject}: in {failure.phase} the allocation of {format_bytes(failure.num_bytes)} by "
        f"{failure.birth.op} in {place} fails, with {format_bytes(failure.allocated_bytes)} allocated and "
        f"{format_bytes(failure.reserved_bytes)} reserved of the {format_bytes(found.capacity_bytes or 0)} that each "
        f"rank may use ({format_bytes(found.overhead_bytes)} of them beside the allocator)."
    )


def render_simulation(closed: ClosedRun, found: SimulationResult) -> RenderableType:
    """Verdict, curve, phases, categories of the peak, largest live tensors."""
    word, _, sentence = verdict(closed, found).partition(":")
    style = "bold green" if found.fits else "bold red" if found.fits is False else "bold yellow"
    parts: list[RenderableType] = [
        Text.assemble((word, style), f":{sentence}"),
        Text(f"layout: {words.describe_layout(closed.run)}", style="dim"),
    ]
    if closed.uncovered:
        parts.append(Text(f"no estimate beside it: {closed.uncovered}", style="dim"))
    parts += [
        "",
        Text(spark_text(found), style="blue"),
        Text(f"bytes allocated over the run; highest {format_bytes(found.allocated_peak_bytes)}", style="dim"),
        "",
        _phases_table(found),
        "",
        _terms_table(terms_of(closed, found), found),
        "",
        Text(f"Largest live tensors in {found.peak.phase}", style="bold"),
        live_table((group.to_dict() for group in found.largest_live[:SHOWN_LIVE]), found.allocated_peak_bytes),
        "",
        Text(_how_traced(found), style="dim"),
    ]
    return Group(*parts)


def _how_traced(found: SimulationResult) -> str:
    count, seconds = f"{found.num_blocks:,} allocations", f"{found.seconds:.1f} s"
    if not found.traced_layers:
        return f"{count} traced in {seconds}"
    *some, last = found.traced_layers
    return f"{count}, exactly as they follow from traces of {', '.join(map(str, some))} and {last} layers, in {seconds}"


def spark_text(found: SimulationResult, width: int = SPARK_WIDTH) -> str:
    """The allocated bytes over the run as a line of blocks; every stretch shows its highest instant."""
    curve = [sum(values) for values in zip(*found.timeline.categories.values(), strict=True)]
    if not curve:
        return ""
    width = min(width, len(curve))
    edges = [index * len(curve) // width for index in range(width + 1)]
    highest = [max(curve[start:end]) for start, end in itertools.pairwise(edges)]
    top = max(highest) or 1
    return "".join(_SPARKS[-(-value * (len(_SPARKS) - 1) // top)] for value in highest)


def _phases_table(found: SimulationResult) -> Table:
    table = _table("Bytes of one rank", ("phase", "allocated, peak", "at its end"))
    has_reserved = found.reserved_peak_bytes is not None
    if has_reserved:
        table.add_column("reserved, peak", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for phase in found.phases:
        is_peak = phase is found.peak
        share = phase.peak_bytes / (found.allocated_peak_bytes or 1)
        cells = [phase.phase, format_bytes(phase.peak_bytes), format_bytes(phase.end_bytes)]
        if has_reserved:
            cells.append(format_bytes(phase.reserved_peak_bytes or 0))
        bar = Text(bar_text(share), style="red" if is_peak else "blue")
        table.add_row(*cells, bar, style="bold" if is_peak else None)
    return table


def _terms_table(terms: Sequence[Term], found: SimulationResult) -> Table:
    table = _table(f"Peak of one rank: {found.peak.phase}", ("category", "bytes", "share"))
    table.add_column("", no_wrap=True)
    used = found.used_peak_bytes or 1
    for term in terms:
        mark = term.basis.name if term.basis is Basis.ASSUMED else ""
        table.add_row(term.name, format_bytes(term.num_bytes), f"{term.num_bytes / used:.1%}", mark)
    table.add_row("used", format_bytes(found.used_peak_bytes), "100.0%", "", style="bold")
    return table


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, header_style="dim")
    table.add_column(columns[0], no_wrap=True)
    for column in columns[1:]:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _term(category: str, num_bytes: int) -> Term:
    note = "tensors of this category alive at the peak of the simulated run"
    return Term(category, num_bytes, Category(category), Basis.DERIVED, note)
