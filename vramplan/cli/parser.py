"""The command line as typer has it, with the subcommand that is called; imported when arguments are to be read."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vramplan.version import __version__

if TYPE_CHECKING:
    from vramplan.cli.app import Subcommand


def make_app(subcommands: Sequence[Subcommand], called: str | None) -> typer.Typer:
    """The command line with the subcommand ``called`` imported; the others are listed but not imported."""
    app = typer.Typer(
        name="vramplan",
        help="Say before launch whether a fine-tuning job fits, plan it, run it, and measure it.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    completing = "_VRAMPLAN_COMPLETE" in os.environ
    for subcommand in subcommands:
        is_called = completing or subcommand.name == called
        function: Callable[..., Any] | typer.Typer = subcommand.load() if is_called else _not_called
        if isinstance(function, typer.Typer):
            app.add_typer(function, name=subcommand.name, help=subcommand.help)
        else:
            app.command(subcommand.name, help=subcommand.help)(function)
    return app


def print_error(text: str) -> None:
    """One line on stderr, red in a terminal."""
    typer.secho(text, fg=typer.colors.RED, err=True)


def _root(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", is_eager=True, callback=lambda on: _print_version(on)),
    ] = False,
) -> None:
    """Options before the subcommand."""


def _print_version(on: bool) -> None:
    if on:
        typer.echo(f"vramplan {__version__}")
        raise typer.Exit


def _not_called() -> None:
    """Stands in ``vramplan --help`` for a subcommand that was not called."""
    raise AssertionError("only the called subcommand runs")
