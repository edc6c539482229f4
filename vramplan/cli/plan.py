"""``vramplan plan``: the fastest layout that fits, written to a directory that ``train`` runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from vramplan.cli.options import RunOptions, asked_run, with_run_options
from vramplan.facts.devices import resolve_node
from vramplan.facts.resolve import resolve_architecture
from vramplan.report.console import render_plan
from vramplan.report.plan_dir import installed_versions, write_plan_dir
from vramplan.search.legal_formats import why_not_trained
from vramplan.search.planner import make_plan


@with_run_options
def plan(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A catalogue name, a hub id, a local directory, or a SPEC.yaml.", show_default=False
        ),
    ],
    options: RunOptions,
    output: Annotated[Path, typer.Option("-o", "--output", help="Directory to write.", show_default=False)],
    verify: Annotated[
        bool, typer.Option("--verify", help="Simulate the choice; what the simulation refuses is passed over.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Choose micro-batch, accumulation, ZeRO stage, offload and checkpointing: the fastest that fits.

    Writes plan.yaml, ds_config.json, launch.sh, and refused.md with the reason against every faster candidate.
    """
    from vramplan.cli.output import show, show_json
    from vramplan.supervise.data_process import planned_for_data

    run, sentence = planned_for_data(asked_run(model, options))
    node, architecture, verified = resolve_node(run.hardware), resolve_architecture(run), None
    if verify:
        from vramplan.simulate.verify import make_verified_plan

        verified = make_verified_plan(run, node, architecture)
    chosen = verified.plan if verified else make_plan(run, node, architecture)
    chosen = replace(chosen, versions=installed_versions())
    files = write_plan_dir(chosen, output)
    if json:
        from vramplan.report.as_json import plan_to_dict

        extra = {"verified": verified.to_dict()} if verified else {}
        show_json({**plan_to_dict(chosen), **extra, "files": [str(path) for path in files]})
        return
    show(render_plan(chosen))
    if verified:
        show(f"\n{verified.text}")
    if sentence is not None:
        show(sentence)
    not_trained = why_not_trained(chosen.run)
    show(f"\nwritten: {', '.join(str(path) for path in files)}")
    show(f"not for vramplan train: {not_trained}" if not_trained else f"next: vramplan train {files[0]}")
