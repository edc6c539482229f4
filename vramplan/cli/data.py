"""``vramplan data``: see what a run is trained on, and choose text from a pool."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

data = typer.Typer(no_args_is_help=True, add_completion=False)


@data.callback()
def _root() -> None:
    """See what a run is trained on, and choose text from a pool."""


@data.command()
def show(
    spec: Annotated[Path, typer.Argument(help="A spec or plan in YAML.", show_default=False)],
    examples: Annotated[int, typer.Option("-n", "--examples", min=0, help="Sequences to print.")] = 3,
    assign: Annotated[
        list[str] | None, typer.Option("--set", help="Any field of the spec, as KEY=VALUE; may be repeated.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Print sources, shares, lengths and padding, and examples with the trained tokens coloured and in ⟦brackets⟧."""
    from vramplan.cli.output import show as show_report
    from vramplan.cli.output import show_json
    from vramplan.report.data_view import render_data
    from vramplan.search.plan import asked_fields
    from vramplan.spec.load import merge, parse_assignments, run_from_mapping
    from vramplan.supervise.data_process import describe_data

    fields, source = asked_fields(str(spec))
    found = describe_data(run_from_mapping(merge(fields, parse_assignments(assign or [])), source), examples)
    if json:
        show_json(found)
    else:
        show_report(render_data(found))


@data.command()
def select(
    pool: Annotated[str, typer.Argument(help="Raw text to choose from, as data.train takes it.", show_default=False)],
    output: Annotated[Path, typer.Option("-o", "--output", help="JSONL to write.", show_default=False)],
    target: Annotated[
        str | None, typer.Option(help="Raw text that the chosen should resemble.", show_default=False)
    ] = None,
    count: Annotated[
        int | None,
        typer.Option(
            "-n",
            "--count",
            min=1,
            help="Documents to choose (default: a tenth of those that pass; all of them without --target).",
        ),
    ] = None,
    assign: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="A filter, as KEY=VALUE: min_chars, max_chars, min_word_frac, max_repeated_line_frac, "
            "min_compressed_frac, near_duplicate or seed; may be repeated.",
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Drop bad and duplicate documents of a pool, choose those like a target, and say what was dropped and why."""
    from pydantic import ValidationError

    from vramplan.cli.output import show as show_report
    from vramplan.cli.output import show_json
    from vramplan.errors import SpecError
    from vramplan.report.data_view import render_selection
    from vramplan.spec.invalid import describe_errors
    from vramplan.spec.load import parse_assignments
    from vramplan.spec.select import SelectSpec
    from vramplan.supervise.data_process import select as run_select

    fields = {"pool": pool, "target": target, "count": count, **parse_assignments(assign or [])}
    try:
        spec = SelectSpec.model_validate(fields)
    except ValidationError as error:
        raise SpecError(describe_errors(SelectSpec, error)) from error
    found = run_select(spec, output)
    if json:
        show_json(found)
    else:
        show_report(render_selection(found))
