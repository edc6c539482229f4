"""``vramplan fit`` as it is mostly called, without the library of the command line, which takes a sixth of its time.

What is not wholly plain (a misspelt option, a number that is none, ``--help``, a value that begins with a dash) is left
to typer, which has the words for it. A test holds both to read the same.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any

from vramplan.cli.options import RunOptions
from vramplan.cli.verdict import print_fit

_NAMES = {"--set" if each.name == "assign" else f"--{each.name.replace('_', '-')}": each for each in fields(RunOptions)}


def fit_plainly(arguments: Sequence[str]) -> int | None:
    """Runs ``vramplan fit`` with plain arguments and returns its exit code; None for other arguments.

    Raises:
        VramplanError: what the user can mend.
    """
    given = read_plain(arguments)
    if given is None or "_VRAMPLAN_COMPLETE" in os.environ:
        return None
    try:
        return print_fit(*given)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # who read it has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def read_plain(arguments: Sequence[str]) -> tuple[str, RunOptions, bool] | None:
    """Model, options and ``--json`` of plain arguments; None for others."""
    models: list[str] = []
    options: dict[str, Any] = {}
    json, words = False, iter(arguments)
    for word in words:
        if not word.startswith("-"):
            models.append(word)
        elif word == "--json":
            json = True
        elif not _read_option(word, words, options):
            return None
    return (models[0], RunOptions(**options), json) if len(models) == 1 else None


def _read_option(word: str, words: Iterator[str], options: dict[str, Any]) -> bool:
    """Whether ``word`` is an option with a plain value, in it or after it, which is then among ``options``."""
    name, separator, text = word.partition("=")
    field = _NAMES.get(name)
    value = text if separator else next(words, "-")
    if field is None or value.startswith("-"):
        return False
    kind = str(field.type)
    if "int |" in kind and not (value.isascii() and value.isdecimal()):
        return False
    if "list[" in kind:
        options.setdefault(field.name, []).append(value)
    else:
        options[field.name] = int(value) if "int |" in kind else value
    return True
