"""Reports of a comparison: predicted beside measured, in terminal, notebook and JSON."""

from __future__ import annotations

from dataclasses import asdict
from html import escape
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from vramplan.measure.compare import Comparison, RecordComparison, Summary
from vramplan.units import format_bytes

GOOD_FRAC, FAIR_FRAC = 0.02, 0.06
"""Absolute errors up to which a figure is green, then yellow, then red: the aims for median and 95th percentile."""


def render_comparison(comparison: Comparison) -> RenderableType:
    """A row a record (and, if asked for, a row a phase), errors by kind of phase, and the summary."""
    parts: list[RenderableType] = [_records_table(comparison), "", _summary_text(comparison.summary)]
    if comparison.with_simulation:
        parts.append(Text("simulated: ").append_text(_summary_text(comparison.simulated_summary)))
    if comparison.phase_summaries:
        parts += ["", _phase_summary_table(comparison.phase_summaries)]
    uncovered = [record for record in comparison.records if not record.covered]
    if uncovered:
        parts += ["", *(Text(f"not compared: {each.id} {each.label}: {each.reason}") for each in uncovered)]
    unsimulated = [record for record in comparison.records if record.simulated_reason]
    if unsimulated:
        parts += [
            "",
            *(Text(f"not simulated: {each.id} {each.label}: {each.simulated_reason}") for each in unsimulated),
        ]
    return Group(*parts)


def comparison_to_dict(comparison: Comparison) -> dict[str, Any]:
    """The answer of ``vramplan compare --json``."""
    answer: dict[str, Any] = {
        "records": [_record_to_dict(record, comparison) for record in comparison.records],
        "summary": asdict(comparison.summary),
    }
    if comparison.with_simulation:
        answer["simulated_summary"] = asdict(comparison.simulated_summary)
    return answer


def comparison_html(comparison: Comparison) -> str:
    """A table of the records and a line of summary."""
    rows = "".join(
        f"<tr><td>{escape(record.id)}</td><td>{escape(record.label)}</td><td>{_bytes(record.predicted_bytes)}</td>"
        f"<td>{_bytes(record.measured_bytes)}</td><td>{_percent(record.error_frac)}</td>"
        f"<td>{escape(record.reason)}</td></tr>"
        for record in comparison.records
    )
    columns = "".join(f"<th>{name}</th>" for name in ("record", "run", "predicted", "measured", "error", "remark"))
    summary = escape(_summary_text(comparison.summary).plain)
    return f"<p>{summary}</p><table><thead><tr>{columns}</tr></thead><tbody>{rows}</tbody></table>"


def _records_table(comparison: Comparison) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("record", no_wrap=True)
    table.add_column("run" if not comparison.show_phases else "run / phase", overflow="fold")
    for name in ("predicted", "measured", "error", *(("simulated", "error") if comparison.with_simulation else ())):
        table.add_column(name, justify="right", no_wrap=True)
    for record in comparison.records:
        simulated = (_bytes(record.simulated_bytes), _error(record.simulated_error_frac))
        table.add_row(
            record.id,
            record.label,
            _bytes(record.predicted_bytes),
            _bytes(record.measured_bytes),
            _error(record.error_frac),
            *(simulated if comparison.with_simulation else ()),
            style="bold" if comparison.show_phases else None,
        )
        for phase in record.phases if comparison.show_phases else ():
            predicted, measured = format_bytes(phase.predicted_bytes), format_bytes(phase.measured_bytes)
            table.add_row("", f"  {phase.phase}", predicted, measured, _error(phase.error_frac))
    return table


def _phase_summary_table(summaries: dict[str, Summary]) -> Table:
    table = Table(title="Peaks by phase", title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.add_column("phase", no_wrap=True)
    for name in ("count", "median |error|", "95th percentile", "worst under", "worst over"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, found in summaries.items():
        sizes = (found.median_abs_error_frac, found.p95_abs_error_frac)
        signed = (found.worst_under_frac, found.worst_over_frac)
        cells = [_percent(size, signed=False) for size in sizes] + [_percent(error) for error in signed]
        table.add_row(name, str(found.num_covered), *cells)
    return table


def _summary_text(summary: Summary) -> Text:
    if summary.num_covered == 0:
        return Text(f"{summary.num_records} records, none compared", style="bold")
    return Text(
        f"{summary.num_covered} of {summary.num_records} records compared: "
        f"median |error| {_percent(summary.median_abs_error_frac, signed=False)}, "
        f"95th percentile {_percent(summary.p95_abs_error_frac, signed=False)}, "
        f"worst under {_percent(summary.worst_under_frac)}, worst over {_percent(summary.worst_over_frac)}",
        style="bold",
    )


def _record_to_dict(record: RecordComparison, comparison: Comparison) -> dict[str, Any]:
    plain: dict[str, Any] = {
        "id": record.id,
        "predicted_bytes": record.predicted_bytes,
        "measured_bytes": record.measured_bytes,
        "error_frac": record.error_frac,
        "covered": record.covered,
    }
    if record.reason:
        plain["reason"] = record.reason
    if comparison.with_simulation:
        plain["simulated_bytes"] = record.simulated_bytes
        plain["simulated_error_frac"] = record.simulated_error_frac
        if record.simulated_reason:
            plain["simulated_reason"] = record.simulated_reason
    if comparison.show_phases:
        plain["phases"] = [{**asdict(phase), "error_frac": phase.error_frac} for phase in record.phases]
    return plain


def _error(error_frac: float | None) -> Text:
    if error_frac is None:
        return Text("not compared", style="dim")
    size = abs(error_frac)
    return Text(_percent(error_frac), style="green" if size <= GOOD_FRAC else "yellow" if size <= FAIR_FRAC else "red")


def _percent(frac: float | None, *, signed: bool = True) -> str:
    if frac is None:
        return ""
    return f"{frac:+.2%}" if signed else f"{frac:.2%}"


def _bytes(num_bytes: int | None) -> str:
    return "" if num_bytes is None else format_bytes(num_bytes)
