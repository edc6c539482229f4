"""Reports for the terminal, by rich."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from vramplan.memory.ledger import Estimate, PhaseBytes
from vramplan.memory.term import Basis
from vramplan.report import words
from vramplan.report.rows import LedgerRow, disk_rows, host_rows, ledger_rows, moment_rows, nearest_refusals
from vramplan.search.fit import Fit
from vramplan.search.plan import Plan, Refusal
from vramplan.units import format_bytes, format_count

BAR_WIDTH = 24
_BASIS_STYLES = {Basis.FITTED: "cyan", Basis.ASSUMED: "yellow"}


def render_fit(fit: Fit) -> RenderableType:
    """Verdict, plan, ledger of the peak, moments, and what is not known exactly."""
    style = "bold green" if fit.fits else "bold red"
    word, _, sentence = words.verdict(fit).partition(":")
    parts: list[RenderableType] = [
        Text.assemble((word, style), f":{sentence}"),
        Text(f"plan: {words.describe_layout(fit.plan.run)}; {words.describe_speed(fit.plan)}", style="dim"),
        "",
        render_estimate(fit.estimate),
    ]
    return Group(*parts)


def render_estimate(found: Estimate) -> RenderableType:
    """The ledger of the peak moment, the host's, and the moments."""
    parts: list[RenderableType] = [ledger_table(f"Peak of one rank: {found.peak.name}", ledger_rows(found))]
    hosted = host_rows(found)
    if hosted:
        total = f"{format_bytes(found.host_bytes_per_node)}, {format_bytes(found.pinned_bytes_per_node)} of it pinned"
        parts += ["", ledger_table(f"Host, one rank of {found.ranks_per_node} (a node: {total})", hosted)]
    filed = disk_rows(found)
    if filed:
        total = format_bytes(found.disk_bytes_per_node)
        parts += ["", ledger_table(f"Disk, one rank of {found.ranks_per_node} (a node: {total})", filed)]
    parts += ["", moments_table(found)]
    uncertain = words.uncertain_terms(found)
    if uncertain:
        parts += ["", *(Text(f"{term.basis.name} {term.name}: {term.note}", style="dim") for term in uncertain)]
    return Group(*parts)


def ledger_table(title: str, rows: Sequence[LedgerRow]) -> Table:
    """Name, bytes, share, bar, and how far each is to be trusted where that is not from shapes or source alone."""
    table = _table(title)
    table.add_column("term", overflow="fold")
    table.add_column("bytes", justify="right", no_wrap=True)
    table.add_column("share", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("", no_wrap=True)
    for row in rows:
        style = "bold" if row.is_total else None
        bar = Text("" if row.is_total else bar_text(row.share), style="blue")
        mark = Text(row.basis.name if row.basis in _BASIS_STYLES and row.basis else "")
        mark.stylize(_BASIS_STYLES.get(row.basis, "") if row.basis else "")
        table.add_row(row.name, format_bytes(row.num_bytes), f"{row.share:.1%}", bar, mark, style=style)
    return table


def moments_table(found: Estimate) -> Table:
    """Every moment that the run passes, with the bytes allocated then; the peak stands out."""
    table = _table("Moments, bytes allocated on one rank")
    table.add_column("moment", overflow="fold")
    table.add_column("bytes", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for row in moment_rows(found):
        bar = Text(bar_text(row.share), style="red" if row.is_total else "blue")
        table.add_row(row.name, format_bytes(row.num_bytes), bar, style="bold" if row.is_total else None)
    return table


def render_plan(plan: Plan) -> RenderableType:
    """What was chosen, what is predicted by phase, and why faster candidates were refused."""
    prediction = plan.prediction
    spare = prediction.capacity_bytes - prediction.used_peak_bytes
    head = Table.grid(padding=(0, 2))
    head.add_column(style="bold", no_wrap=True)
    head.add_column(overflow="fold")
    head.add_row("run", words.describe_run(plan.run))
    head.add_row("on", words.describe_node(plan.node))
    head.add_row("plan", words.describe_layout(plan.run))
    head.add_row("speed", words.describe_speed(plan))
    head.add_row(
        "peak",
        f"{prediction.peak_moment}: {format_bytes(prediction.used_peak_bytes)} used of "
        f"{format_bytes(prediction.capacity_bytes)} ({format_bytes(spare)} to spare)",
    )
    if prediction.host_bytes_per_node:
        known = prediction.host_capacity_bytes
        of = f" of {format_bytes(known)}" if known is not None else " (the host's memory is not known)"
        head.add_row("host", f"{format_bytes(prediction.host_bytes_per_node)} per node{of}")
    parts: list[RenderableType] = [head, "", phases_table(prediction.phases)]
    parts += (
        ["", refusals_table(plan.refused)] if plan.refused else ["", Text("No better-looking candidate was refused.")]
    )
    return Group(*parts)


def phases_table(phases: Sequence[PhaseBytes]) -> Table:
    """Predicted bytes allocated on one rank, phase by phase."""
    table = _table("Predicted, bytes allocated on one rank")
    table.add_column("phase", no_wrap=True)
    table.add_column("peak", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("at its end", justify="right", no_wrap=True)
    highest = max((phase.peak_bytes for phase in phases), default=0)
    for phase in phases:
        share = phase.peak_bytes / highest if highest else 0.0
        bar = Text(bar_text(share), style="blue")
        table.add_row(phase.phase, format_bytes(phase.peak_bytes), bar, format_bytes(phase.end_bytes))
    return table


def refusals_table(refused: Sequence[Refusal]) -> RenderableType:
    """Candidates that looked better, with the reason against each: of each layout the one nearest to fitting."""
    table = _table("Better-looking candidates that were refused")
    table.add_column("candidate", overflow="fold")
    table.add_column("tokens/s", justify="right", no_wrap=True)
    table.add_column("why not", overflow="fold")
    shown = nearest_refusals(refused)
    for refusal in shown:
        table.add_row(refusal.candidate.label(), format_count(int(refusal.tokens_per_s)), refusal.reason)
    more = len(refused) - len(shown)
    return Group(table, Text(f"and {more} more of them with larger micro-batches", style="dim")) if more else table


def bar_text(share: float, width: int = BAR_WIDTH) -> str:
    """A bar of ``share`` of ``width`` cells, in eighths of a cell; at least a sliver where there is anything."""
    eighths = max(round(share * width * 8), 1 if share > 0 else 0)
    full, rest = divmod(min(eighths, width * 8), 8)
    return "█" * full + (" ▏▎▍▌▋▊▉"[rest] if rest else "")


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, header_style="dim")
