"""What a run was predicted to hold and what it held, phase by phase."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from vramplan.measure.record import PhaseReading
from vramplan.memory.ledger import PhaseBytes
from vramplan.units import format_bytes

_MICRO = re.compile(r"^(step\d+)\.micro(\d+)\.(\w+)$")


@dataclass(frozen=True, slots=True)
class PhaseRow:
    """Peak bytes of a phase on one rank; a figure is None where that witness is silent."""

    phase: str
    predicted_bytes: int | None
    measured_bytes: int | None

    @property
    def error_frac(self) -> float | None:
        """predicted / measured - 1."""
        if self.predicted_bytes is None or not self.measured_bytes:
            return None
        return self.predicted_bytes / self.measured_bytes - 1


def phase_rows(predicted: Sequence[PhaseBytes], measured: Sequence[PhaseReading]) -> list[PhaseRow]:
    """A row for each measured phase, in order; micro-batches after the first of a step share a row (the highest)."""
    foreseen = _by_row({phase.phase: phase.peak_bytes for phase in predicted})
    seen = _by_row({reading.phase: reading.allocated_peak_bytes for reading in measured})
    return [PhaseRow(name, foreseen.get(name), num_bytes) for name, num_bytes in seen.items()]


def train_peak_row(rows: Iterable[PhaseRow]) -> PhaseRow:
    """The highest of the steps' phases: what decides whether a run fits."""
    steps = [row for row in rows if row.phase.startswith("step")]
    return PhaseRow(
        "highest of the steps",
        max((row.predicted_bytes for row in steps if row.predicted_bytes is not None), default=None),
        max((row.measured_bytes for row in steps if row.measured_bytes is not None), default=None),
    )


def render_measured(
    predicted: Sequence[PhaseBytes], measured: Sequence[PhaseReading], came: Sequence[PhaseBytes] = ()
) -> RenderableType:
    """The table predicted | measured, and the figure that decides.

    ``came``: what is predicted of the batches that came, where it was not known before which would.
    """
    rows = phase_rows(predicted, measured)
    table = Table(
        title="Bytes allocated on one rank: predicted | measured",
        title_justify="left",
        title_style="bold",
        box=None,
        pad_edge=False,
        header_style="dim",
    )
    table.add_column("phase", no_wrap=True)
    for name in ("predicted", "measured", "error"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*_cells(row))
    table.add_row(*_cells(train_peak_row(rows)), style="bold")
    notes = [Text("measured: in each phase, the rank that held most", style="dim")]
    smaller = [f"{name} {format_bytes(num_bytes)}" for name, num_bytes in _smaller(rows, came)]
    if smaller:
        notes.append(
            Text(f"predicted for the batches that came, which were smaller: {', '.join(smaller)}", style="dim")
        )
    return Group(table, *notes)


def _smaller(rows: Iterable[PhaseRow], came: Sequence[PhaseBytes]) -> Iterator[tuple[str, int]]:
    """Of measured phases whose prediction is more than 1 % lower for what came: that."""
    found = _by_row({phase.phase: phase.peak_bytes for phase in came})
    for row in rows:
        if row.predicted_bytes and found.get(row.phase, row.predicted_bytes) < 0.99 * row.predicted_bytes:
            yield row.phase, found[row.phase]


def _cells(row: PhaseRow) -> tuple[str, str, str, str]:
    error = row.error_frac
    return (
        row.phase,
        "-" if row.predicted_bytes is None else format_bytes(row.predicted_bytes),
        "-" if row.measured_bytes is None else format_bytes(row.measured_bytes),
        "" if error is None else f"{error:+.1%}",
    )


def _by_row(peaks: Mapping[str, int]) -> dict[str, int]:
    """Peaks by the name of their row."""
    last_micro: dict[str, int] = {}
    for phase in peaks:
        if match := _MICRO.match(phase):
            last_micro[match[1]] = max(last_micro.get(match[1], 0), int(match[2]))
    rows: dict[str, int] = {}
    for phase, num_bytes in peaks.items():
        name = _row_name(phase, last_micro)
        rows[name] = max(rows.get(name, 0), num_bytes)
    return rows


def _row_name(phase: str, last_micro: Mapping[str, int]) -> str:
    match = _MICRO.match(phase)
    if match is None:
        return phase
    step, micro, kind = match[1], int(match[2]), match[3]
    if kind == "optimizer_step":  # one a step, whatever micro-batch it follows
        return f"{step}.{kind}"
    if micro == 1:
        return f"{step}.micro1.{kind}"
    last = last_micro[step]
    return f"{step}.micro2{f'..{last}' if last > 2 else ''}.{kind}"
