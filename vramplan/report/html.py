"""Reports for a notebook: self-contained fragments of HTML, with nothing fetched and no script."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from vramplan.memory.ledger import Estimate
from vramplan.memory.term import Basis
from vramplan.report import words
from vramplan.report.rows import LedgerRow, host_rows, ledger_rows, moment_rows, nearest_refusals
from vramplan.search.fit import Fit
from vramplan.search.plan import Plan
from vramplan.units import format_bytes, format_count

_NUMBER = "text-align:right;white-space:nowrap"
_TEXT = "text-align:left"
_GOOD, _BAD, _BAR = "#2e7d32", "#c62828", "#4c78a8"


def fit_html(fit: Fit) -> str:
    """Verdict, plan, ledger and moments."""
    word, _, sentence = words.verdict(fit).partition(":")
    colour = _GOOD if fit.fits else _BAD
    return "".join(
        (
            f'<p><b style="color:{colour}">{escape(word)}</b>:{escape(sentence)}</p>',
            f"<p>plan: {escape(words.describe_layout(fit.plan.run))}; {escape(words.describe_speed(fit.plan))}</p>",
            estimate_html(fit.estimate),
        )
    )


def estimate_html(found: Estimate) -> str:
    """The ledger of the peak, the host's, the moments, and what is not known exactly."""
    parts = [_ledger(f"Peak of one rank: {found.peak.name}", ledger_rows(found))]
    hosted = host_rows(found)
    if hosted:
        parts.append(_ledger(f"Host, one rank of {found.ranks_per_node}", hosted))
    parts.append(_moments(moment_rows(found)))
    notes = [f"{term.basis.name} {term.name}: {term.note}" for term in words.uncertain_terms(found)]
    if notes:
        parts.append("<ul>" + "".join(f"<li>{escape(note)}</li>" for note in notes) + "</ul>")
    return "".join(parts)


def plan_html(plan: Plan) -> str:
    """What was chosen, the prediction by phase, and why faster candidates were refused."""
    prediction = plan.prediction
    used, capacity = format_bytes(prediction.used_peak_bytes), format_bytes(prediction.capacity_bytes)
    facts = (
        ("run", words.describe_run(plan.run)),
        ("on", words.describe_node(plan.node)),
        ("plan", words.describe_layout(plan.run)),
        ("speed", words.describe_speed(plan)),
        ("peak", f"{prediction.peak_moment}: {used} used of {capacity}"),
    )
    phases = [
        (phase.phase, format_bytes(phase.peak_bytes), format_bytes(phase.end_bytes)) for phase in prediction.phases
    ]
    refused = [
        (refusal.candidate.label(), format_count(int(refusal.tokens_per_s)), refusal.reason)
        for refusal in nearest_refusals(plan.refused)
    ]
    return "".join(
        (
            _table("Plan", (), facts, numbers=()),
            _table("Predicted, bytes allocated on one rank", ("phase", "peak", "at its end"), phases, numbers=(1, 2)),
            _table(
                "Better-looking candidates that were refused",
                ("candidate", "tokens/s", "why not"),
                refused,
                numbers=(1,),
            ),
        )
    )


def _ledger(title: str, rows: Iterable[LedgerRow]) -> str:
    body = "".join(
        _row(
            (
                _cell(escape(row.name), _TEXT, row.note),
                _cell(format_bytes(row.num_bytes), _NUMBER),
                _cell(f"{row.share:.1%}", _NUMBER),
                _cell("" if row.is_total else _bar(row.share), "width:14em"),
                _cell(row.basis.name if row.basis in (Basis.FITTED, Basis.ASSUMED) and row.basis else "", _TEXT),
            ),
            bold=row.is_total,
        )
        for row in rows
    )
    return _frame(title, _header(("term", "bytes", "share", "", ""), numbers=(1, 2)), body)


def _moments(rows: Iterable[LedgerRow]) -> str:
    body = "".join(
        _row(
            (
                _cell(escape(row.name), _TEXT),
                _cell(format_bytes(row.num_bytes), _NUMBER),
                _cell(_bar(row.share, _BAD if row.is_total else _BAR), "width:14em"),
            ),
            bold=row.is_total,
        )
        for row in rows
    )
    return _frame("Moments, bytes allocated on one rank", _header(("moment", "bytes", ""), numbers=(1,)), body)


def _table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int]) -> str:
    """A plain table; empty where it has no rows. ``numbers``: columns that are aligned right."""
    body = "".join(
        _row(_cell(escape(text), _NUMBER if index in numbers else _TEXT) for index, text in enumerate(row))
        for row in rows
    )
    return _frame(title, _header(columns, numbers) if columns else "", body) if body else ""


def _frame(title: str, header: str, body: str) -> str:
    caption = f'<caption style="{_TEXT};font-weight:bold">{escape(title)}</caption>'
    return f"<table>{caption}<thead>{header}</thead><tbody>{body}</tbody></table>"


def _header(columns: Sequence[str], numbers: Sequence[int]) -> str:
    cells = (
        f'<th style="{_NUMBER if index in numbers else _TEXT}">{escape(name)}</th>'
        for index, name in enumerate(columns)
    )
    return f"<tr>{''.join(cells)}</tr>"


def _row(cells: Iterable[str], *, bold: bool = False) -> str:
    style = ' style="font-weight:bold"' if bold else ""
    return f"<tr{style}>{''.join(cells)}</tr>"


def _cell(content: str, style: str, tooltip: str = "") -> str:
    title = f' title="{escape(tooltip, quote=True)}"' if tooltip else ""
    return f'<td style="{style}"{title}>{content}</td>'


def _bar(share: float, colour: str = _BAR) -> str:
    return f'<div style="background:{colour};height:0.8em;width:{min(share, 1.0) * 100:.1f}%"></div>'
