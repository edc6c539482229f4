"""The command line: one table of subcommands; a subcommand's module is imported only when it is the one called.

Each module ``vramplan/cli/<name>.py`` has a plain typed function of the same name; its signature is its options.
"""

from __future__ import annotations

import gc
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from vramplan.errors import VramplanError

_OBJECTS_BETWEEN_COLLECTIONS = 100_000
"""Imports and walks of a tape make thousands of objects that stay, and next to no cycles: looking for these every 700
objects, as Python does, is a tenth of the time in which `vramplan fit` starts."""


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


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one subcommand and exit: 2 for what the user can mend, else as the subcommand says."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    threshold = gc.get_threshold()
    gc.set_threshold(_OBJECTS_BETWEEN_COLLECTIONS)
    try:
        _run(argv)
    finally:
        gc.set_threshold(*threshold)
        if arguments is None:  # the process ends here: what it made goes with it, and need not be looked through again
            gc.freeze()


def _run(argv: list[str]) -> None:
    # pydantic looks through the metadata of every installed package for plugins, of which vramplan uses none: a quarter
    # of the time in which `vramplan fit` starts. Set before pydantic is imported; what the user has set stays.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    try:
        if argv[:1] == ["fit"]:
            from vramplan.cli.plain import fit_plainly

            code = fit_plainly(argv[1:])
            if code is not None:
                sys.exit(code)
        from vramplan.cli.parser import make_app

        called = next((word for word in argv if not word.startswith("-")), None)
        make_app(SUBCOMMANDS, called)(argv, prog_name="vramplan")
    except VramplanError as error:
        from vramplan.cli.parser import print_error

        print_error(f"vramplan: {error}")
        sys.exit(error.exit_code)
