"""Tables and JSON as every listing subcommand prints them."""

from __future__ import annotations

import json
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

_WIDE = 10_000  # columns; more than any row has


def make_table(*columns: str) -> Table:
    """A table with these columns; a name that ends in `` >`` is a column of numbers, aligned right."""
    table = Table(box=None, pad_edge=False, header_style="bold", row_styles=("", "dim"))
    for name in columns:
        numeric = name.endswith(" >")
        table.add_column(
            name.removesuffix(" >"),
            justify="right" if numeric else "left",
            no_wrap=numeric,
            overflow="fold",
        )
    return table


def print_table(table: Table) -> None:
    """Print it; where stdout is no terminal, as wide as it needs, so that a pipe gets whole rows."""
    console = Console(highlight=False, markup=False)  # brackets, as in vramplan[eval], are text
    if not console.is_terminal:
        console = Console(highlight=False, markup=False, width=_WIDE)
    console.print(table)


def print_note(text: str) -> None:
    """A line below a table."""
    typer.echo(text)


def print_json(value: Any) -> None:
    """One JSON document on stdout, numbers whole."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))
