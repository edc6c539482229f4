"""A trace on disk: one ``.npz`` file."""

from __future__ import annotations

import json
from array import array
from dataclasses import asdict
from pathlib import Path

import numpy as np

from vramplan.memory.birth import Birth
from vramplan.simulate.trace import PhaseSpan, Trace

_COLUMNS = ("num_bytes", "born_at", "died_at", "birth", "category", "place", "stream")


def save_trace(trace: Trace, path: Path) -> None:
    """Writes the trace, compressed."""
    rest = {
        "births": [birth.to_dict() for birth in trace.births],
        "phases": [asdict(span) for span in trace.phases],
        "cache_emptied_at": trace.cache_emptied_at,
        "num_instants": trace.num_instants,
    }
    columns = {name: np.array(getattr(trace, name)) for name in _COLUMNS}
    with path.open("wb") as file:
        np.savez_compressed(file, rest=np.array(json.dumps(rest)), **columns)  # type: ignore[arg-type]


def load_trace(path: Path) -> Trace:
    """The trace that ``save_trace`` wrote."""
    with np.load(path) as stored:
        rest = json.loads(str(stored["rest"]))
        trace = Trace(
            births=[Birth(**birth) for birth in rest["births"]],
            phases=[PhaseSpan(**span) for span in rest["phases"]],
            cache_emptied_at=rest["cache_emptied_at"],
            num_instants=rest["num_instants"],
        )
        for name in _COLUMNS:
            column: array[int] = getattr(trace, name)
            column.frombytes(stored[name].astype(column.typecode).tobytes())
    return trace
