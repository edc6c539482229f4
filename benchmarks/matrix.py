"""Estimator against simulator over families, methods, stages, checkpointing, attention and what else decides bytes.

python benchmarks/matrix.py -o runs/matrix.jsonl                  # a pairwise cover of all factors: some hundred runs,
                                                                  # or what the file still lacks of one
python benchmarks/matrix.py -o runs/matrix.jsonl --quick          # the same with the models taking turns: about 50
python benchmarks/matrix.py -o runs/matrix.jsonl --full           # what the file still lacks of every family x method x
                                                                  # stage x checkpointing x attention x precision, the
                                                                  # other factors drawn
python benchmarks/matrix.py -o runs/matrix.jsonl --table benchmarks/matrix.md

Two simulations at a time. The output file keeps what was simulated, which is not run again; ``--table`` compares it
with the estimates as they are now.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from vramplan.errors import SimulationError
from vramplan.measure.compare import quantile
from vramplan.memory.ledger import PhaseBytes
from vramplan.simulate.request import Simulator
from vramplan.simulate.result import SimulationResult

from support.matrix import (
    FACTORS,
    PEAK_FRAC,
    PHASE_FRAC,
    SHALLOW,
    Case,
    Difference,
    Prepared,
    beyond_the_bar,
    cover_in_turns,
    covered_models,
    differences,
    known_reason,
    pairwise,
    prepare,
    why_not,
)

BATCH = 200
"""Simulations of one server."""
CROSSED = ("method", "stage", "checkpointing", "attention", "precision")


def full_matrix(ran: Iterable[Case] = (), seed: int = 0, tries: int = 60) -> list[Case]:
    """The first model of every family, two layers deep, with every combination of ``CROSSED`` that can be run and that
    no case of ``ran`` has in that family.

    The other factors are drawn, again and again until the case is legal and covered; a combination for which that
    never happens is left out (flash attention in a family without it, say). One micro-batch a step is drawn seven
    times as often as two: it takes half the time.
    """
    draw = random.Random(seed)
    firsts = {model.partition(".")[0]: model for model in reversed(covered_models())}
    others = {name: values for name, values in FACTORS.items() if name not in (*CROSSED, "model")}
    others["accum"] = [1] * 7 + [2]
    done = {(case.family, *(case[name] for name in CROSSED)) for case in ran}
    cases = []
    for family, *crossed in itertools.product(firsts, *(FACTORS[name] for name in CROSSED)):
        if (family, *crossed) in done:
            continue
        model = firsts[family]
        fixed = {"model": f"{model}{SHALLOW}", **dict(zip(CROSSED, crossed, strict=True))}
        drawn = (Case.of({name: draw.choice(values) for name, values in others.items()} | fixed) for _ in range(tries))
        cases += itertools.islice((case for case in drawn if not why_not(case)), 1)
    draw.shuffle(cases)  # so that what is done of it is spread over all
    return cases


def rows_of(path: Path) -> dict[str, dict[str, Any]]:
    if not path.exists():
        return {}
    return {row["case"]: row for row in map(json.loads, path.read_text(encoding="utf-8").splitlines())}


def run(cases: list[Case], path: Path, parallel: int) -> None:
    done = rows_of(path)
    todo = [case for case in cases if case.key not in done]
    print(f"{len(cases)} cases, {len(todo)} to simulate", flush=True)
    with path.open("a", encoding="utf-8") as file:
        for count, (prepared, row) in enumerate(simulated(todo, parallel), 1):
            file.write(json.dumps(row) + "\n")
            file.flush()
            said = row["error"] or "; ".join(str(each) for each in _beyond(prepared, row)[:3])
            if said:
                print(f"{count}/{len(todo)} {row['case']}: {said}", flush=True)


def _beyond(prepared: Prepared, row: dict[str, Any]) -> list[Difference]:
    return beyond_the_bar(prepared.estimate, [PhaseBytes(*phase) for phase in row["phases"]])


def simulated(todo: list[Case], parallel: int) -> Iterator[tuple[Prepared, dict[str, Any]]]:
    """A row for each case that is covered; a process that dies takes those beside it along, which are begun again
    without it."""
    waiting = {case.key: case for case in todo}
    while waiting:
        batch = {}
        for case in list(waiting.values())[:BATCH]:
            found = prepare(case)
            if isinstance(found, Prepared):
                batch[case.key] = found
            else:
                del waiting[case.key]
        try:
            with Simulator(parallel) as simulator:
                for request, result in simulator.run(prepared.request() for prepared in batch.values()):
                    yield batch[request.key], row_of(waiting.pop(request.key), result)
        except SimulationError as error:
            key = next(iter(waiting))
            del waiting[key]
            yield batch[key], {"case": key, "error": f"died: {error}", "phases": []}


def row_of(case: Case, result: SimulationResult) -> dict[str, Any]:
    phases = [] if result.error else [[each.phase, each.peak_bytes, each.end_bytes] for each in result.phases]
    return {"case": case.key, "error": result.error, "phases": phases}


@dataclass(frozen=True, slots=True)
class Compared:
    """A simulated case beside its estimate."""

    case: Case
    peak: Difference
    phase: Difference
    """Of the phases' figures the one that differs most."""
    beyond: tuple[Difference, ...]

    @classmethod
    def of(cls, prepared: Prepared, simulated: Sequence[PhaseBytes]) -> Self:
        peak, *phases = differences(prepared.estimate, simulated)
        worst = max(phases, key=lambda each: abs(each.error_frac))
        return cls(prepared.case, peak, worst, tuple(beyond_the_bar(prepared.estimate, simulated)))


def compared(rows: dict[str, dict[str, Any]]) -> list[Compared]:
    """Every case that was simulated to its end and is still covered."""
    ran = [(prepare(Case.parse(key)), row["phases"]) for key, row in rows.items() if row["error"] is None]
    return [
        Compared.of(prepared, [PhaseBytes(*phase) for phase in phases])
        for prepared, phases in ran
        if isinstance(prepared, Prepared)
    ]


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The state of the matrix as Markdown."""
    ran = compared(rows)
    peaks = sorted(abs(each.peak.error_frac) for each in ran)
    phases = sorted(abs(each.phase.error_frac) for each in ran)
    beyond = [(each, known_reason(each.case)) for each in ran if each.beyond]
    reasons = Counter(reason for _, reason in beyond if reason)
    lines = [
        "# Estimator against simulator",
        "",
        f"Bar: {PEAK_FRAC:.0%} at the steps' highest peak, {PHASE_FRAC:.0%} at every phase's peak and end. "
        "Written by `python benchmarks/matrix.py`.",
        "",
        f"{len(ran)} runs; |error| of the peak: median {quantile(peaks, 0.5):.3%}, 95th percentile "
        f"{quantile(peaks, 0.95):.3%}, worst {peaks[-1]:.2%}; worst phase of each run: median "
        f"{quantile(phases, 0.5):.3%}, 95th percentile {quantile(phases, 0.95):.3%}, worst {phases[-1]:.2%}.",
        "",
        f"Within the bar: {len(ran) - len(beyond)}. Beyond it with a known reason: {sum(reasons.values())}. "
        f"Beyond it without one: {len(beyond) - sum(reasons.values())}.",
        "",
        *_by_factor(ran),
        *_list("Known differences", [f"{reason} ({count} runs)" for reason, count in reasons.most_common()]),
        *_list(
            "Beyond the bar without a known reason",
            [f"`{each.case.key}`: {each.beyond[0]}" for each, reason in beyond if not reason],
        ),
        *_list(
            "Refused by the real stack, or not traced",
            [f"{error} ({count} runs)" for error, count in _errors(rows).most_common()],
        ),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _by_factor(ran: list[Compared]) -> Iterator[str]:
    for name in ("family", *FACTORS):
        if name == "model":
            continue
        yield from (f"| {name} | runs | worst at the peak | worst of a phase | beyond the bar |", "| --- " * 5 + "|")
        values: dict[str, list[Compared]] = {}
        for each in ran:
            values.setdefault(str(each.case.family if name == "family" else each.case[name]), []).append(each)
        for value, some in sorted(values.items()):
            peak = max((each.peak.error_frac for each in some), key=abs)
            phase = max((each.phase.error_frac for each in some), key=abs)
            yield f"| {value} | {len(some)} | {peak:+.2%} | {phase:+.2%} | {sum(bool(each.beyond) for each in some)} |"
        yield ""


def _errors(rows: dict[str, dict[str, Any]]) -> Counter[str]:
    return Counter(str(row["error"])[:300] for row in rows.values() if row["error"])


def _list(title: str, items: list[str]) -> list[str]:
    return [f"## {title}", "", *(f"- {item}" for item in items), ""] if items else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True, help="JSONL file of what has been run")
    parser.add_argument("--full", action="store_true", help="every combination instead of a pairwise cover")
    parser.add_argument("--quick", action="store_true", help="a pairwise cover in which the models take turns")
    parser.add_argument("--limit", type=int, default=None, help="at most this many cases")
    parser.add_argument("--parallel", type=int, default=2)
    parser.add_argument("--table", type=Path, default=None, help="only write the table of what has been run")
    options = parser.parse_args()
    if options.table is not None:
        options.table.write_text(table(rows_of(options.output)), encoding="utf-8")
        return
    ran = [Case.parse(row["case"]) for row in rows_of(options.output).values() if row["error"] is None]
    if options.full:
        cases = full_matrix(ran)
    elif options.quick:
        cases = cover_in_turns()
    else:
        cases = pairwise({**FACTORS, "model": covered_models()}, taken=ran)
    run(cases[: options.limit], options.output, options.parallel)


if __name__ == "__main__":
    main()
