"""``vramplan fit``: the verdict in one sentence, then the ledger of the peak."""

from __future__ import annotations

from typing import Annotated

import typer

from vramplan.cli.options import RunOptions, with_run_options
from vramplan.cli.verdict import print_fit


@with_run_options
def fit(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A catalogue name, a hub id, a local directory, or a SPEC.yaml.", show_default=False
        ),
    ],
    options: RunOptions,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Say whether a run fits, and which tensors take the memory. What is left open is searched.

    Exit code: 0 it fits, 1 it does not, 2 the input is wrong.
    """
    raise typer.Exit(print_fit(model, options, json))
