"""What a subcommand prints: a report by rich, or one JSON document."""

from __future__ import annotations

import json
import sys
from typing import Any

from rich.console import Console, RenderableType

_WIDE = 10_000
"""Columns where stdout is no terminal: more than any line has, so that a pipe gets whole lines."""


def show(report: RenderableType) -> None:
    """Prints a report; nothing in it stretches to the width, so a pipe gets it as it is."""
    console = Console(highlight=False, emoji=False, markup=False)  # brackets, as in a path, are text
    if not console.is_terminal:
        console = Console(highlight=False, emoji=False, markup=False, width=_WIDE)
    console.print(report)


def show_json(value: Any) -> None:
    """One JSON document on stdout."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
