"""``vramplan compare``: predicted beside measured memory, record by record."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vramplan.cli.output import show, show_json
from vramplan.measure.compare import compare_file
from vramplan.report.compared import comparison_to_dict, render_comparison


def compare(
    records: Annotated[
        Path, typer.Argument(metavar="RECORDS.jsonl", help="A JSONL file of measurement records.", show_default=False)
    ],
    phases: Annotated[bool, typer.Option("--phases", help="Also compare every phase of every record.")] = False,
    simulate: Annotated[
        bool, typer.Option("--simulate", help="Also simulate every record (needs torch; seconds a record).")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Lay predicted memory beside measured memory. Every record is answered, also one that is not covered."""
    comparison = compare_file(records, show_phases=phases)
    if simulate:
        from vramplan.cli.simulated import simulate_comparison
        from vramplan.measure.record import read_records_leniently

        comparison = simulate_comparison(comparison, read_records_leniently(records))
    if json:
        show_json(comparison_to_dict(comparison))
    else:
        show(render_comparison(comparison))
