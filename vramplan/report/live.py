"""Live tensors at a peak, measured or simulated, as a table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich.table import Table

from vramplan.units import format_bytes


def live_table(rows: Iterable[Mapping[str, Any]], peak_bytes: int) -> Table:
    """Rows as in a record's ``live_at_peak``: equal births together, with their sum, count and birthplace."""
    table = Table(box=None, pad_edge=False, header_style="bold", row_styles=("", "dim"))
    for name in ("bytes", "exactly", "share", "count"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("operator", "backward of", "module", "born at", "called from", "phase"):
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(
            format_bytes(row["bytes"]),
            str(row["bytes"]),
            f"{row['bytes'] / peak_bytes:.1%}" if peak_bytes else "",
            str(row["count"]),
            *(str(row.get(key, "")) for key in ("op", "node", "module", "frame", "outer_frame", "phase")),
        )
    return table
