"""What the driver and the allocator hold beyond tensors: one data file, which a calibrated one can replace."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from vramplan.errors import SpecError
from vramplan.units import MIB

BASES = ("exact", "derived", "fitted", "assumed")
SHIPPED = Path(__file__).with_name("data") / "overhead.json"


@dataclass(frozen=True, slots=True)
class Cost:
    """Bytes of one process: what is planned with, and the least and the most that was seen or is feared."""

    num_bytes: int
    low_bytes: int
    high_bytes: int
    basis: str
    source: str


@dataclass(frozen=True, slots=True)
class Fragmentation:
    """What the caching allocator holds beyond tensors, in thousandths of their bytes at the peak.

    ``needed``: what it cannot give back before an allocation fails. ``low`` and ``high``: what it was seen to hold
    where there was room.
    """

    needed_per_mille: int
    low_per_mille: int
    high_per_mille: int
    basis: str
    source: str


@dataclass(frozen=True, slots=True)
class Overheads:
    """Every figure of the data file; generations are compute capabilities from which on a figure holds."""

    contexts: tuple[tuple[tuple[int, int], Cost], ...]
    workspaces: tuple[tuple[tuple[int, int], Cost], ...]
    num_handles: int
    handles_source: str
    cudnn: Cost
    communicator: Cost
    fragmentation: Fragmentation
    fragmentation_expandable: Fragmentation

    def context(self, capability: tuple[int, int] | None) -> Cost:
        """The driver's context on a device; that of the oldest generation where it is unknown."""
        return _since(self.contexts, capability)

    def workspace(self, capability: tuple[int, int] | None) -> Cost:
        """cuBLAS's workspace of one handle and stream."""
        return _since(self.workspaces, capability)


def _since(rows: tuple[tuple[tuple[int, int], Cost], ...], capability: tuple[int, int] | None) -> Cost:
    return [cost for since, cost in rows if since <= (capability or rows[0][0])][-1]


@lru_cache(maxsize=16)
def overheads(path: str | None = None) -> Overheads:
    """The figures of a file of the shipped one's form, or the shipped ones.

    Raises:
        SpecError: the file cannot be read, or a figure is missing; the text names it.
    """
    file = Path(path).expanduser() if path is not None else SHIPPED
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise SpecError(f"hardware.overhead: {file} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise SpecError(f"hardware.overhead: {file} is not JSON ({error})") from error
    try:
        return _overheads(raw)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise SpecError(
            f"hardware.overhead: {file}: {_what(error)}; the form is that of vramplan/facts/data/overhead.json"
        ) from error


def _what(error: Exception) -> str:
    return f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)


def _overheads(raw: Mapping[str, Any]) -> Overheads:
    return Overheads(
        contexts=_generations(raw["device_context"]),
        workspaces=_generations(raw["cublas_workspace"]),
        num_handles=int(raw["cublas_handles"]["count"]),
        handles_source=raw["cublas_handles"]["source"],
        cudnn=_cost(raw["cudnn_workspace"]),
        communicator=_cost(raw["communicator"]),
        fragmentation=_fragmentation(raw["fragmentation"]["default"]),
        fragmentation_expandable=_fragmentation(raw["fragmentation"]["expandable_segments"]),
    )


def _generations(rows: list[Mapping[str, Any]]) -> tuple[tuple[tuple[int, int], Cost], ...]:
    if not rows:
        raise ValueError("a list of generations is empty")
    found = []
    for row in rows:
        major, minor = str(row["since"]).split(".")
        found.append(((int(major), int(minor)), _cost(row)))
    return tuple(sorted(found, key=lambda each: each[0]))


def _cost(row: Mapping[str, Any]) -> Cost:
    middle, low, high = (round(float(row[key]) * MIB) for key in ("mib", "low_mib", "high_mib"))
    _check(row, middle, low, high)
    return Cost(middle, low, high, row["basis"], row["source"])


def _fragmentation(row: Mapping[str, Any]) -> Fragmentation:
    needed, low, high = (int(row[f"{key}_per_mille"]) for key in ("needed", "low", "high"))
    _check(row, needed, low, high)
    return Fragmentation(needed, low, high, row["basis"], row["source"])


def _check(row: Mapping[str, Any], middle: int, low: int, high: int) -> None:
    if row["basis"] not in BASES:
        raise ValueError(f"basis is {row['basis']!r}; it is one of {', '.join(BASES)}")
    if not 0 <= low <= middle <= high:
        raise ValueError(f"a figure is not between its low and its high: {row['source'][:60]!r}")
