"""How results show themselves: ``print``, rich, and the last line of a notebook cell.

The types live in ``memory`` and ``search``, which know nothing of reports; the top-level package registers their
rendering here before it hands one out.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

from rich.console import Console, RenderableType

from vramplan.measure.compare import Comparison
from vramplan.memory.ledger import Estimate
from vramplan.report import compared, console, html
from vramplan.search.fit import Fit
from vramplan.search.plan import Plan

_TEXT_WIDTH = 120

_RENDERINGS: tuple[tuple[type, Callable[[Any], RenderableType], Callable[[Any], str]], ...] = (
    (Estimate, console.render_estimate, html.estimate_html),
    (Fit, console.render_fit, html.fit_html),
    (Plan, console.render_plan, html.plan_html),
    (Comparison, compared.render_comparison, compared.comparison_html),
)


def register() -> None:
    """Gives each result type ``__rich__``, ``__str__`` and ``_repr_html_``; doing it again changes nothing."""
    for kind, render, as_html in _RENDERINGS:
        setattr(kind, "__rich__", render)  # noqa: B010 - the class declares no such attribute to assign to
        setattr(kind, "__str__", _as_text(render))  # noqa: B010
        setattr(kind, "_repr_html_", as_html)  # noqa: B010


def to_text(renderable: RenderableType, width: int = _TEXT_WIDTH) -> str:
    """What a terminal of ``width`` columns would show, without colours."""
    console = Console(file=io.StringIO(), width=width, markup=False, color_system=None, legacy_windows=False)
    with console.capture() as captured:
        console.print(renderable)
    return captured.get().rstrip("\n")


def _as_text(render: Callable[[Any], RenderableType]) -> Callable[[Any], str]:
    return lambda result: to_text(render(result))
