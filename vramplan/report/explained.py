"""``vramplan explain``: estimate and simulation side by side, and what each change would give."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from vramplan.memory.ledger import Estimate
from vramplan.report import words
from vramplan.report.simulated import verdict
from vramplan.simulate.changes import Explained
from vramplan.simulate.result import CATEGORY_ORDER, SimulationResult
from vramplan.units import format_bytes


def explained_to_dict(answer: Explained) -> dict[str, Any]:
    """The answer of ``vramplan explain --json``."""
    estimated = answer.closed.estimate
    return {
        "model": answer.closed.asked.model,
        "verdict": verdict(answer.closed, answer.found),
        "fits": answer.found.fits,
        "estimated_peak_bytes": estimated.allocated_peak_bytes if estimated else None,
        "simulated_peak_bytes": answer.found.allocated_peak_bytes,
        "uncovered": answer.closed.uncovered,
        "error": answer.found.error,
        "phases": [
            {"phase": name, "estimated_bytes": ours, "simulated_bytes": theirs}
            for name, ours, theirs in _phases(estimated, answer.found)
        ],
        "categories": [
            {"category": name, "estimated_bytes": ours, "simulated_bytes": theirs}
            for name, ours, theirs in _categories(estimated, answer.found)
        ],
        "changes": [
            {
                "change": change.name,
                "allocated_peak_bytes": found.allocated_peak_bytes if found.error is None else None,
                "used_peak_bytes": found.used_peak_bytes if found.error is None else None,
                "saved_bytes": _saved(answer.found, found),
                "fits": found.fits,
                "error": found.error,
            }
            for change, found in answer.changes
        ],
    }


def render_explained(answer: Explained) -> RenderableType:
    """Verdict, phases, categories at the peak, and changes."""
    estimated, found = answer.closed.estimate, answer.found
    parts: list[RenderableType] = [
        Text(verdict(answer.closed, found), style="bold"),
        Text(f"layout: {words.describe_layout(answer.closed.run)}", style="dim"),
    ]
    if answer.closed.uncovered:
        parts.append(Text(f"no estimate beside it: {answer.closed.uncovered}", style="dim"))
    parts += ["", _side_by_side("Bytes allocated on one rank, phase by phase", "phase", _phases(estimated, found))]
    title = "At the peak, by category"
    if estimated is not None:
        title += f" (estimated: {estimated.peak.name}; simulated: {found.peak.phase})"
    parts += ["", _side_by_side(title, "category", _categories(estimated, found)), "", _changes_table(answer)]
    return Group(*parts)


def _phases(estimated: Estimate | None, found: SimulationResult) -> list[tuple[str, int | None, int | None]]:
    ours = {phase.phase: phase.peak_bytes for phase in estimated.phases} if estimated else {}
    return [(phase.phase, ours.get(phase.phase), phase.peak_bytes) for phase in found.phases]


def _categories(estimated: Estimate | None, found: SimulationResult) -> list[tuple[str, int | None, int | None]]:
    ours: dict[str, int] = {}
    for term in estimated.peak.terms if estimated else ():
        ours[term.category.value] = ours.get(term.category.value, 0) + term.num_bytes
    theirs = found.categories
    rows: list[tuple[str, int | None, int | None]] = [
        (name, ours.get(name, 0) if estimated else None, theirs.get(name, 0))
        for name in CATEGORY_ORDER
        if ours.get(name) or theirs.get(name)
    ]
    total = estimated.allocated_peak_bytes if estimated else None
    return [*rows, ("allocated by tensors", total, found.allocated_peak_bytes)]


def _side_by_side(title: str, what: str, rows: list[tuple[str, int | None, int | None]]) -> Table:
    table = _table(title, what, ("estimated", "simulated", "difference"))
    for name, ours, theirs in rows:
        apart = ours - theirs if ours is not None and theirs is not None else None
        table.add_row(name, _bytes(ours), _bytes(theirs), "" if not apart else signed(apart))
    return table


def _changes_table(answer: Explained) -> Table:
    table = _table("What one change would give, each simulated", "change", ("allocated", "used", "difference", "fits"))
    table.add_column("", overflow="fold")
    for change, found in answer.changes:
        saved = _saved(answer.found, found)
        if saved is None:
            table.add_row(change.name, "", "", "", "", found.error or "")
            continue
        fits = {True: "yes", False: "no", None: ""}[found.fits]
        figures = (format_bytes(found.allocated_peak_bytes), format_bytes(found.used_peak_bytes), signed(-saved))
        table.add_row(change.name, *figures, fits, "")
    return table


def _saved(before: SimulationResult, after: SimulationResult) -> int | None:
    """Allocated bytes of the peak that the change takes away; None where either run did not reach its end."""
    if before.error is not None or after.error is not None:
        return None
    return before.allocated_peak_bytes - after.allocated_peak_bytes


def signed(num_bytes: int) -> str:
    """E.g. ``−11.2 GiB``."""
    return f"{'−' if num_bytes < 0 else '+'}{format_bytes(abs(num_bytes))}"


def _bytes(value: int | None) -> str:
    return "" if value is None else format_bytes(value)


def _table(title: str, first: str, numbers: tuple[str, ...]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, header_style="dim")
    table.add_column(first, overflow="fold")
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table
