"""Boundaries of micro-batches as a table, as JSON, and each run as a line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from vramplan.measure.boundary import Boundary
from vramplan.measure.record import Record
from vramplan.units import format_bytes


def boundary_table(found: Sequence[Boundary]) -> Table:
    """One row a job."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("job")
    for name in ("capacity", "largest that runs", "largest estimated"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("runs")
    table.add_column("")
    for each in found:
        runs = " ".join(f"{size}:{outcome}" for size, outcome in each.tried)
        table.add_row(
            each.id, format_bytes(each.cap_bytes), _number(each.measured), _number(each.estimated), runs, each.reason
        )
    return table


def boundary_to_dict(found: Boundary) -> dict[str, Any]:
    """One job of ``bench boundary --json``."""
    return {
        "id": found.id,
        "cap_bytes": found.cap_bytes,
        "measured_micro_batch_size": found.measured,
        "estimated_micro_batch_size": found.estimated,
        "runs": [{"micro_batch_size": size, "outcome": outcome} for size, outcome in found.tried],
        "reason": found.reason,
    }


def run_line(record: Record) -> str:
    """One run: its outcome and its peak as far as it came."""
    measured = record.measured
    peak = format_bytes(measured.allocated_peak_bytes or 0)
    return f"{record.id}: {measured.outcome}, {peak} {measured.error or ''}".rstrip()


def _number(value: int | None) -> str:
    return "-" if value is None else str(value)
