"""What ``recovery.py`` found: its file of results, and the table that is made of it."""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import threading
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
Kind = tuple[int, str, int]
"""ZeRO stage, method, ranks."""


@dataclass(frozen=True)
class Reference:
    """An uninterrupted run: what every run of its kind is compared with."""

    stage: int
    method: str
    ranks: int
    losses: dict[int, float]
    samples: dict[int, str]


@dataclass
class Outcome:
    """What a run showed."""

    case: str
    stage: int
    method: str
    ranks: int
    exit_code: int
    recovered: bool
    as_it_must: bool
    """Whether it ended with a code that is right, in time, and left no process."""
    attempts: int
    causes: list[str]
    steps_repeated: int
    seconds_lost: float | None
    """From the newest checkpoint before each failure to the first step that had not been done yet, summed; None where
    that was not measured."""
    largest_loss_difference: float
    """To the uninterrupted run of the first plan, over all steps."""
    same_samples: bool
    changes: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    said: str = ""


def difference(own: dict[int, float], other: dict[int, float]) -> float:
    """The largest, over the steps of the first."""
    return max((abs(own[step] - other[step]) for step in own), default=math.nan)


class Results:
    """The file of results: what it holds of the code as it is; what it holds of other code is dropped."""

    def __init__(self, path: Path, table: Path, order: Sequence[str]) -> None:
        self._path, self._table, self._order = path, table, order
        self._code, self._lock = _code(), threading.Lock()
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        kept = [each for each in map(json.loads, lines) if each.get("code") == self._code]
        self.references = {_kind(each): _reference(each) for each in kept if "losses" in each}
        self.outcomes = [_outcome(each) for each in kept if "case" in each]
        path.write_text("".join(json.dumps(each) + "\n" for each in kept), encoding="utf-8")

    @property
    def done(self) -> set[tuple[str, int, str, int]]:
        return {(each.case, each.stage, each.method, each.ranks) for each in self.outcomes}

    def add(self, result: Outcome | Reference) -> None:
        with self._lock:
            if isinstance(result, Outcome):
                self.outcomes.append(result)
            else:
                self.references[result.stage, result.method, result.ranks] = result
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**asdict(result), "code": self._code}) + "\n")
            self.write_table()

    def write_table(self) -> None:
        text = _table(self.outcomes, list(self.references.values()), self._order, self._code)
        self._table.write_text(text, encoding="utf-8")


def _kind(fields: dict[str, Any]) -> Kind:
    return fields["stage"], fields["method"], fields["ranks"]


def _reference(fields: dict[str, Any]) -> Reference:
    losses_of, samples = ({int(step): value for step, value in fields[name].items()} for name in ("losses", "samples"))
    return Reference(*_kind(fields), losses_of, samples)


def _outcome(fields: dict[str, Any]) -> Outcome:
    return Outcome(**{name: value for name, value in fields.items() if name != "code"})


def _code() -> str:
    """The commit that last changed what is run here, with a + where it was changed since."""
    about = ["--", "vramplan", "tests/support", "benchmarks/recovery.py"]
    git = ["git", "-C", str(HERE.parent)]
    commit = subprocess.run([*git, "log", "-1", "--format=%h", *about], capture_output=True, text=True, check=True)
    changed = subprocess.run([*git, "status", "--porcelain", *about], capture_output=True, text=True, check=True)
    return commit.stdout.strip() + "+" * bool(changed.stdout.strip())


def _table(every: Sequence[Outcome], references: Sequence[Reference], order: Sequence[str], code: str) -> str:
    """One line a fault, method and number of ranks, with what it showed under every stage."""
    spread = " and ".join(f"{most:.1e} ({method})" for method, most in _spread(references).items())
    lines = [
        "# Recovery from real faults",
        "",
        f"{len(every)} runs of `python benchmarks/recovery.py` at {code}, on two and four CPU ranks: 8 steps, a "
        "checkpoint and an evaluation every third; the "
        "loss is compared step by step with that of the uninterrupted run of the first plan. "
        f"{sum(each.recovered for each in every)} came to their end, {sum(each.as_it_must for each in every)} ended as "
        "they must (exit code, time, no process left); "
        f"{sum(each.same_samples for each in every)} saw the very samples, step by step, of the uninterrupted run.",
        "",
        "A run that did not recover ended by itself with exit code 4 and its reason: no plan needs less memory there. "
        "Seconds lost are from the newest checkpoint (or the first event) to the first step that had not been done "
        "yet; most of them start processes and import libraries. Uninterrupted runs under different ZeRO stages and "
        f"numbers of ranks, which add in another order, differ from each other by at most {spread}.",
        "",
        "| fault | method | ranks | ZeRO | recovered | launches | steps repeated | seconds lost "
        "| largest loss difference |",
        "| --- | --- | ---: | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for (case, method, ranks), group in _grouped(every, order).items():
        recovered = [each for each in group if each.recovered]
        lines.append(
            f"| {case} | {method} | {ranks} | {', '.join(str(each.stage) for each in group)} "
            f"| {len(recovered)} of {len(group)} | "
            f"{_span([each.attempts for each in group])} | {_span([each.steps_repeated for each in recovered])} | "
            f"{_median([each.seconds_lost for each in recovered if each.seconds_lost is not None])} | "
            f"{_largest([each.largest_loss_difference for each in recovered])} |"
        )
    return "\n".join([*lines, ""])


def _spread(references: Sequence[Reference]) -> dict[str, float]:
    """How far apart uninterrupted runs of a method are."""
    return {
        method: max(difference(one.losses, other.losses) for one in group for other in group)
        for method in sorted({each.method for each in references})
        if (group := [each for each in references if each.method == method])
    }


def _grouped(outcomes: Iterable[Outcome], order: Sequence[str]) -> dict[tuple[str, str, int], list[Outcome]]:
    groups: dict[tuple[str, str, int], list[Outcome]] = {}
    for each in sorted(outcomes, key=lambda each: each.stage):
        groups.setdefault((each.case, each.method, each.ranks), []).append(each)
    return dict(sorted(groups.items(), key=lambda entry: (order.index(entry[0][0]), *entry[0][1:])))


def _span(values: list[int]) -> str:
    return "" if not values else str(values[0]) if min(values) == max(values) else f"{min(values)} to {max(values)}"


def _median(values: list[float]) -> str:
    return f"{statistics.median(values):.0f}" if values else ""


def _largest(values: list[float]) -> str:
    return ("0" if max(values) == 0 else f"{max(values):.1e}") if values else ""
