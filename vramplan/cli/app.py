"""The command line: one table of subcommands; a subcommand's module is imported only when it is the one called.

Each module ``vramplan/cli/<name>.py`` has a plain typed function of the same name; its signature is its options.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, cast

# pydantic looks through the metadata of every installed package for plugins, of which vramplan uses none: a quarter of
# the time in which `vramplan fit` starts. Set before pydantic is imported; what the user has set stays.
os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")

import typer

from vramplan.errors import VramplanError
from vramplan.version import __version__


@dataclass(frozen=True, slots=True)
class Subcommand:
    """Where a subcommand's function is, and its line in ``vramplan --help``."""

    name: str
    help: str

    def load(self) -> Callable[..., Any]:
        """The function, or the Typer of its own subcommands, with everything that it imports at module level."""
        module = importlib.import_module(f"vramplan.cli.{self.name}")
        return cast(Callable[..., Any], getattr(module, self.name))


SUBCOMMANDS = (
    Subcommand("init", "Write a recipe for a task: a spec with the reason for each choice in it."),
    Subcommand("fit", "Say whether a run fits, and which tensors take the memory."),
    Subcommand("simulate", "Run the real engine of one rank on fake tensors, and show every byte."),
    Subcommand("explain", "Lay estimate and simulation side by side, and simulate what each change would give."),
    Subcommand("plan", "Choose the layout that trains fastest among those that fit, and write it down."),
    Subcommand("train", "Run a plan on DeepSpeed."),
    Subcommand("compare", "Lay predicted memory beside measured memory, record by record."),
    Subcommand("bench", "Measure memory for real: run jobs, find the largest micro-batch, list live tensors."),
    Subcommand("data", "See what a run is trained on: sources, lengths, and exactly which tokens."),
    Subcommand("fields", "List the fields of a spec: what each takes, its default, and what it is for."),
    Subcommand("models", "List the catalogue of models."),
    Subcommand("gpus", "List the catalogue of GPUs."),
    Subcommand("doctor", "Check this machine: versions, GPUs, memory, DeepSpeed, and what will hurt."),
)


def make_app(called: str | None) -> typer.Typer:
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
    for subcommand in SUBCOMMANDS:
        function = subcommand.load() if completing or subcommand.name == called else _not_called
        if isinstance(function, typer.Typer):
            app.add_typer(function, name=subcommand.name, help=subcommand.help)
        else:
            app.command(subcommand.name, help=subcommand.help)(function)
    return app


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one subcommand and exit: 2 for what the user can mend, else as the subcommand says."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    called = next((word for word in argv if not word.startswith("-")), None)
    try:
        make_app(called)(argv, prog_name="vramplan")
    except VramplanError as error:
        typer.secho(f"vramplan: {error}", fg=typer.colors.RED, err=True)
        sys.exit(error.exit_code)


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
