"""The outcomes of ``forgetting.py``: how they are kept and how they are laid in tables."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

BEFORE = "before training"
DOMAINS = {
    "time-zones": "the rules and zones of the time-zone database (tzdata.zi of the package tzdata, public domain), in "
    "stretches of 60 lines",
    "python-reference": "the Python reference (pydoc_data.topics)",
}


@dataclass(frozen=True)
class Shape:
    """What a run's outcome is compared with: the same domain, data, length and rate."""

    steps: int
    batch: int
    seq_len: int
    num_eval: int
    """Held-out sequences of each set."""
    lr: float
    """Peak rate; methods that name their own have that."""
    domain: str = "python-reference"
    precision: str = "fp32"

    def evaluates_as(self, other: Shape) -> bool:
        """Whether what is held out is the same, so that the model before training is."""
        return self._evaluated == other._evaluated

    @property
    def _evaluated(self) -> tuple[str, str, int, int]:
        return self.domain, self.precision, self.seq_len, self.num_eval


@dataclass(frozen=True)
class Outcome:
    """What one run gave."""

    method: str
    seed: int
    shape: Shape
    domain: float
    """Perplexity of held-out documents of the domain."""
    general: float
    moved: float
    """Euclidean distance of all weights (adapters: of theirs) from where they were."""
    seconds: float
    """Processor time of the steps, what comes before them (Fisher diagonal, copy of the base) not counted; where the
    precision is fp32, of the wall's clock."""


def read(path: Path) -> list[Outcome]:
    """The runs that were made so far."""
    if not path.exists():
        return []
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [Outcome(**{**line, "shape": Shape(**line["shape"])}) for line in lines]


def belongs(outcome: Outcome, shape: Shape) -> bool:
    """Whether it is of the comparison: of the model before training only what is held out counts."""
    return outcome.shape.evaluates_as(shape) if outcome.method == BEFORE else outcome.shape == shape


def write_tables(outcomes: Sequence[Outcome], shape: Shape, settings: str, path: Path) -> None:
    """The asked comparison first, then those of other shapes with several methods, then single trials."""
    shapes = dict.fromkeys(each.shape for each in outcomes if each.method != BEFORE and each.shape != shape)
    full = [each for each in shapes if len({one.method for one in outcomes if one.shape == each} - {BEFORE}) > 2]
    lines = [
        "# Forgetting",
        "",
        "`python benchmarks/forgetting.py` (adds what `forgetting.jsonl` does not hold yet, and writes this file)",
        "",
        settings,
        "",
        "Gained: how far domain perplexity fell; lost: how far general perplexity rose, both against the model before "
        "training. Means over the seeds, each in brackets. Weights moved: Euclidean distance from the start (lora: of "
        "the adapters).",
        "",
        *(line for each in (shape, *full) for line in table(outcomes, each)),
        *trials(outcomes, [each for each in shapes if each not in full]),
    ]
    path.write_text("\n".join(lines).rstrip("\n") + "\n", encoding="utf-8")


def table(outcomes: Iterable[Outcome], shape: Shape) -> list[str]:
    """One comparison: a line a method, best and worst as they came."""
    every = [each for each in outcomes if belongs(each, shape)]
    base = next(each for each in every if each.method == BEFORE)
    names = dict.fromkeys(each.method for each in every if each.method != BEFORE)
    clock = "processor seconds" if shape.precision != "fp32" else "seconds"
    return [
        f"## {shape.domain}: {shape.steps} steps of {shape.batch} x {shape.seq_len} tokens at {shape.lr:g}",
        "",
        f"Domain: {DOMAINS[shape.domain]}. {shape.precision}, {shape.num_eval} held-out sequences a set "
        f"({shape.num_eval * (shape.seq_len - 1):,} predicted tokens). Before training: domain perplexity "
        f"{base.domain:.2f}, general {base.general:.2f}.",
        "",
        f"| method | seeds | domain perplexity | gained | general perplexity | lost | weights moved | {clock} |",
        "| --- | ---: | ---: | --- | ---: | --- | ---: | ---: |",
        *(row(name, base, [each for each in every if each.method == name]) for name in names),
        "",
    ]


def row(name: str, base: Outcome, found: list[Outcome]) -> str:
    """One line of a table."""
    gained = [1 - each.domain / base.domain for each in found]
    lost = [each.general / base.general - 1 for each in found]

    def shown(values: list[float]) -> str:
        return f"{statistics.mean(values):+.1%} ({', '.join(f'{value:+.1%}' for value in values)})"

    def mean(values: Iterable[float], digits: int) -> str:
        return f"{statistics.mean(values):.{digits}f}"

    cells = [name, str(len(found)), mean((each.domain for each in found), 2), shown(gained)]
    cells += [mean((each.general for each in found), 2), shown(lost)]
    cells += [mean((each.moved for each in found), 2), mean((each.seconds for each in found), 0)]
    return "| " + " | ".join(cells) + " |"


def trials(outcomes: Sequence[Outcome], shapes: Sequence[Shape]) -> list[str]:
    """The runs of other lengths and rates: what the rate was chosen by."""
    lines = []
    for shape in sorted(shapes, key=lambda each: (each.domain, each.lr, each.steps)):
        base = next(each for each in outcomes if each.method == BEFORE and each.shape.evaluates_as(shape))
        lines += [
            f"| {shape.domain} | {each.method}, seed {each.seed} | {shape.steps} x {shape.batch} x {shape.seq_len} "
            f"| {shape.lr:g} | {1 - each.domain / base.domain:+.1%} | {each.general / base.general - 1:+.1%} |"
            for each in outcomes
            if each.shape == shape and each.method != BEFORE
        ]
    if not lines:
        return []
    return [
        "## Trials",
        "",
        "Rates were chosen by trial; those of this script (`--domain D --lr RATE --steps STEPS --only none`):",
        "",
        "| domain | run | steps x batch x tokens | peak rate | gained | lost |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
        *lines,
    ]
