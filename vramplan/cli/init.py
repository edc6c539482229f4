"""``vramplan init``: a recipe for a task, with your model and data put into it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vramplan.errors import DataError, SpecError, UnknownNameError, VramplanError
from vramplan.spec.recipes import ADAPTER_RANKS, TASKS, Recipe, read_recipe

if TYPE_CHECKING:
    from vramplan.spec.run import RunSpec


def init(
    task: Annotated[
        str,
        typer.Option(
            help="; ".join(f"{name}: {text}" for name, text in TASKS.items()), metavar="TASK", show_default=False
        ),
    ],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="File to write (default: TASK.yaml).", show_default=False)
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="A catalogue name, a hub id, or a local directory.", show_default=False)
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="full, lora, dora or qlora, instead of the recipe's.", show_default=False)
    ] = None,
    data: Annotated[str | None, typer.Option(help="Your rows, as data.train takes them.", show_default=False)] = None,
    general: Annotated[
        str | None, typer.Option(help="General rows, replayed against forgetting.", show_default=False)
    ] = None,
) -> None:
    """Write a spec for a task, with its reasons beside it: base model, rates, epochs, mixture, retention.

    It runs as it stands on the model and data that come with the installation; put yours in and adapt it.
    """
    from vramplan.cli.output import show
    from vramplan.facts.resolve import resolve_config
    from vramplan.spec.check import check_run
    from vramplan.spec.load import run_from_mapping

    target = output or Path(f"{task}.yaml")
    recipe = read_recipe(task)
    recipe = recipe.with_values(_values(recipe, model, method, data, general))
    run = run_from_mapping(recipe.fields)
    check_run(run)
    refused = None
    if model is not None:
        resolve_config(run)  # a name that nothing has is an error here, not in the commands that read the recipe
        refused = _why_refused(run)
    _check_present({"--data": data, "--general": general})
    if target.exists():
        raise SpecError(f"{target} exists: give another file with -o")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(recipe.text, encoding="utf-8")
    except OSError as error:
        raise SpecError(f"{target}: cannot be written ({error.strerror}); choose another -o") from error
    if refused is not None:
        show(f"note: as it stands `vramplan plan` refuses it: {refused}")
    planned = "" if refused else f"; vramplan plan {target} -o plan"
    show(f"written: {target}\nnext: vramplan data show {target}{planned}")


def _why_refused(run: RunSpec) -> str | None:
    """Why no plan can be made of a recipe with the model put into it, whatever the planner chooses; None where one
    may."""
    from vramplan.facts.devices import resolve_node
    from vramplan.facts.resolve import resolve_architecture
    from vramplan.search.choose import check_sequence_length
    from vramplan.search.legality import with_usual_attention
    from vramplan.search.price import priced

    try:
        architecture = resolve_architecture(run)
        check_sequence_length(run, architecture)
        priced(with_usual_attention(run, architecture), resolve_node(run.hardware), architecture)
    except VramplanError as error:
        return str(error)
    return None


def _check_present(paths: dict[str, str | None]) -> None:
    """Raises:
    DataError: what an option names is not there, which is better said here than by the commands that read it.
    """
    from vramplan.data.source import check_present

    for option, path in paths.items():
        if path is None:
            continue
        try:
            check_present(path)
        except (DataError, UnknownNameError) as error:
            raise DataError(f"{option}: {error}") from error


def _values(
    recipe: Recipe, model: str | None, method: str | None, data: str | None, general: str | None
) -> dict[str, Any]:
    """By dotted key, what is put into the recipe."""
    fields = recipe.fields
    if general is not None and "replay" not in fields["data"]:
        raise SpecError(f"--general: the recipe for {recipe.task} replays nothing; add data.replay by hand")
    given = {
        "model": model,
        "method": None if method in (None, fields["method"]["kind"]) else _method(recipe.task, method),
        "data.train.path" if isinstance(fields["data"]["train"], dict) else "data.train": data,
        "data.replay.path": general,
    }
    return {key: value for key, value in given.items() if value is not None}


def _method(task: str, kind: str) -> dict[str, Any]:
    """A method by its name; adapters with the rank that the recipe's own comment asks for."""
    from vramplan.spec.load import expand_kinds

    method: dict[str, Any] = expand_kinds({"method": kind})["method"]
    rank = ADAPTER_RANKS.get(task)
    return method if rank is None or method["kind"] not in ("lora", "qlora") else {**method, "r": rank}
