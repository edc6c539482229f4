"""``vramplan explain``: where estimate and simulation put the bytes, and what each change would give."""

from __future__ import annotations

from typing import Annotated

import typer

from vramplan.cli.options import RunOptions, with_run_options
from vramplan.cli.simulate import Cap, Model, TrustRemoteCode, closed_from_options
from vramplan.errors import SimulationError
from vramplan.simulate.changes import explain as explain_run


@with_run_options
def explain(
    model: Model,
    options: RunOptions,
    cap: Cap = None,
    trust_remote_code: TrustRemoteCode = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Lay estimate and simulation side by side, and simulate what each single change would give."""
    from vramplan.cli.output import show, show_json
    from vramplan.report.explained import explained_to_dict, render_explained

    answer = explain_run(closed_from_options(model, options, cap, trust_remote_code))
    if answer.found.error is not None:
        raise SimulationError(answer.found.error)
    if json:
        show_json(explained_to_dict(answer))
    else:
        show(render_explained(answer))
