"""What ``vramplan fit`` prints: the verdict in one sentence, then the ledger of the peak."""

from __future__ import annotations

from vramplan.cli.options import RunOptions, asked_run
from vramplan.facts.devices import resolve_node
from vramplan.facts.resolve import resolve_architecture
from vramplan.search.fit import fit_run


def print_fit(model: str, options: RunOptions, json: bool) -> int:
    """Prints whether the run fits; returns the exit code: 0 it fits, 1 it does not.

    Raises:
        VramplanError: the input is wrong.
    """
    run = asked_run(model, options)
    found = fit_run(run, resolve_node(run.hardware), resolve_architecture(run))
    from vramplan.cli.output import show, show_json

    if json:
        from vramplan.report.as_json import fit_to_dict

        show_json(fit_to_dict(found))
    else:
        from vramplan.report.console import render_fit

        show(render_fit(found))
    return 0 if found.fits else 1
