"""``vramplan fields``: every key of a spec, with what it takes and what it is for."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from vramplan.cli import tables


def fields(
    key: Annotated[str | None, typer.Argument(help="A key, or a section such as data or retain.ewc.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print a list of objects.")] = False,
) -> None:
    """List the fields of a spec: what each takes, its default, and what it is for."""
    from vramplan.spec.fields import list_fields

    found = list_fields(key)
    if json:
        tables.print_json([asdict(each) for each in found])
        return
    table = tables.make_table("key", "takes", "default", "what it is for")
    for each in found:
        table.add_row(each.key, each.takes, each.default, each.text)
    tables.print_table(table)
