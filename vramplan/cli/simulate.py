"""``vramplan simulate``: the real engine of one rank on fake tensors, every byte that would be alive."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from vramplan.cli.options import RunOptions, asked_run, with_run_options
from vramplan.errors import SimulationError, SpecError
from vramplan.simulate.asked import ClosedRun, close_run, node_to_simulate
from vramplan.simulate.request import simulate_jobs
from vramplan.spec.load import merge, run_from_mapping

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A catalogue name, a hub id, a local directory, a SPEC.yaml or a plan.yaml.",
        show_default=False,
    ),
]
Cap = Annotated[
    str | None,
    typer.Option("--cap", help="Bytes of a GPU that one rank may use, such as 24GiB.", show_default=False),
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")
]


def closed_from_options(model: str, options: RunOptions, cap: str | None, trust_remote_code: bool) -> ClosedRun:
    """The run to simulate that a command line asks for, with nothing left open.

    Raises:
        SpecError: an option, file or value that cannot be.
    """
    if None not in (cap, options.memory_cap) and cap != options.memory_cap:
        raise SpecError(f"--cap {cap} and --memory-cap {options.memory_cap} say different things: give one of them")
    run = asked_run(model, options)
    if trust_remote_code:
        run = run_from_mapping(merge(run.model_dump(exclude_unset=True), {"training": {"trust_remote_code": True}}))
    return close_run(run, node_to_simulate(run, cap))


@with_run_options
def simulate(
    model: Model,
    options: RunOptions,
    cap: Cap = None,
    trust_remote_code: TrustRemoteCode = False,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Directory for a page of the timeline and a snapshot.", show_default=False),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Run the real model, adapters and DeepSpeed engine of one rank without hardware, and show every byte.

    With -o: timeline.html (stacked bytes by category; the pointer names the tensors) and snapshot.pickle for
    pytorch.org/memory_viz.

    What is left open is chosen as `fit` does. Exit code: 0 it fits, 1 it does not, 2 the input is wrong or the run
    cannot be traced to its end (what was traced is shown).
    """
    from vramplan.cli.output import show, show_json
    from vramplan.report.simulated import render_simulation, simulation_to_dict
    from vramplan.report.simulation_dir import trace_beside, write_simulation_dir

    closed = closed_from_options(model, options, cap, trust_remote_code)
    with trace_beside(output) if output is not None else nullcontext() as trace:
        ((_, found),) = simulate_jobs([replace(closed.request(), save_trace=trace)])
        if found.error is not None and not any(phase.peak_bytes for phase in found.phases):
            raise SimulationError(found.error)
        files = write_simulation_dir(closed, found, trace, output) if output is not None and trace is not None else []
    if json:
        show_json({**simulation_to_dict(closed, found), **({"files": [str(path) for path in files]} if files else {})})
    else:
        show(render_simulation(closed, found))
        if files:
            show(f"\nwritten: {', '.join(str(path) for path in files)}")
    if found.error is not None:
        raise SimulationError(found.error)
    raise typer.Exit(0 if found.fits else 1)
