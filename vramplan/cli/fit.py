"""``vramplan fit``: the verdict in one sentence, then the ledger of the peak."""

from __future__ import annotations

from typing import Annotated

import typer

from vramplan.cli.options import RunOptions, asked_run, with_run_options
from vramplan.facts.devices import resolve_node
from vramplan.facts.resolve import resolve_architecture
from vramplan.search.fit import fit_run


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
    from vramplan.cli.output import show, show_json

    run = asked_run(model, options)
    found = fit_run(run, resolve_node(run.hardware), resolve_architecture(run))
    if json:
        from vramplan.report.as_json import fit_to_dict

        show_json(fit_to_dict(found))
    else:
        from vramplan.report.console import render_fit

        show(render_fit(found))
    raise typer.Exit(0 if found.fits else 1)
