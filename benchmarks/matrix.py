"""Estimator against simulator over families, methods, stages, checkpointing, attention and what else decides bytes.

python benchmarks/matrix.py -o runs/matrix.jsonl                  # a pairwise cover of all factors: some hundred runs
python benchmarks/matrix.py -o runs/matrix.jsonl --quick          # the same with the models taking turns: about 50
python benchmarks/matrix.py -o runs/matrix.jsonl --full           # every family x method x stage x checkpointing x
                                                                  # attention, the other factors drawn
python benchmarks/matrix.py -o runs/matrix.jsonl --table benchmarks/matrix.md

Two simulations at a time; what the output file holds is not run again. The table is written from the file.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from vramplan.errors import SimulationError
from vramplan.measure.compare import quantile
from vramplan.simulate.request import Simulator

from support.matrix import (
    FACTORS,
    PEAK_FRAC,
    PHASE_FRAC,
    Case,
    Prepared,
    beyond_the_bar,
    covered_models,
    differences,
    known_reason,
    pairwise,
    prepare,
)

CROSSED = ("method", "stage", "checkpointing", "attention")


def full_matrix(seed: int = 0) -> list[Case]:
    """The first model of every family with every combination of ``CROSSED``; the other factors are drawn."""
    draw = random.Random(seed)
    firsts = {model.partition(".")[0]: model for model in reversed(covered_models())}
    cases = []
    for model, *crossed in itertools.product(firsts.values(), *(FACTORS[name] for name in CROSSED)):
        drawn = {name: draw.choice(values) for name, values in FACTORS.items()}
        cases.append(Case.of({**drawn, "model": model, **dict(zip(CROSSED, crossed, strict=True))}))
    draw.shuffle(cases)  # so that what is done of it is spread over all
    return cases


def rows_of(path: Path) -> dict[str, dict[str, Any]]:
    if not path.exists():
        return {}
    return {row["case"]: row for row in map(json.loads, path.read_text(encoding="utf-8").splitlines())}


def run(cases: list[Case], path: Path, parallel: int) -> None:
    done = rows_of(path)
    todo = [prepared for case in cases if case.key not in done and isinstance(prepared := prepare(case), Prepared)]
    print(f"{len(cases)} cases, {len(todo)} to simulate")
    with path.open("a", encoding="utf-8") as file:
        for count, row in enumerate(simulated(todo, parallel), 1):
            file.write(json.dumps(row) + "\n")
            file.flush()
            if row["beyond"] or row["error"]:
                print(f"{count}/{len(todo)} {row['case']}: {row['error'] or '; '.join(row['beyond'][:3])}", flush=True)


def simulated(todo: list[Prepared], parallel: int) -> Iterator[dict[str, Any]]:
    """A row a case; a process that dies takes those beside it along, which are begun again without it."""
    waiting = {prepared.case.key: prepared for prepared in todo}
    while waiting:
        batch = list(itertools.islice(waiting.values(), 50))
        try:
            with Simulator(parallel) as simulator:
                for request, result in simulator.run(prepared.request() for prepared in batch):
                    yield row_of(waiting.pop(request.key), result)
        except SimulationError as error:
            key = next(iter(waiting))
            del waiting[key]
            yield {"case": key, "error": f"died: {error}", "beyond": [], "worst": [0.0, 0.0]}


def row_of(prepared: Prepared, result: Any) -> dict[str, Any]:
    row: dict[str, Any] = {"case": prepared.case.key, "error": result.error, "beyond": [], "worst": [0.0, 0.0]}
    if result.error is None:
        peak, *phases = differences(prepared.estimate, result)
        row["worst"] = [peak.error_frac, max((each.error_frac for each in phases), key=abs)]
        row["beyond"] = [str(each) for each in beyond_the_bar(prepared.estimate, result)]
    return row


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The state of the matrix as Markdown."""
    cases = {key: Case.parse(key) for key in rows}
    ran = {key: row for key, row in rows.items() if row["error"] is None}
    peaks = sorted(abs(row["worst"][0]) for row in ran.values())
    phases = sorted(abs(row["worst"][1]) for row in ran.values())
    named = {key: known_reason(cases[key]) for key, row in ran.items() if row["beyond"]}
    reasons = Counter(reason for reason in named.values() if reason)
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
        f"Within the bar: {len(ran) - len(named)}. Beyond it with a known reason: {sum(reasons.values())}. "
        f"Beyond it without one: {len(named) - sum(reasons.values())}.",
        "",
        *_by_factor(ran, cases),
        *_list("Known differences", [f"{reason} ({count} runs)" for reason, count in reasons.most_common()]),
        *_list(
            "Beyond the bar without a known reason",
            [f"`{key}`: {ran[key]['beyond'][0]}" for key, reason in named.items() if not reason],
        ),
        *_list(
            "Refused by the real stack, or not traced",
            [f"{error} ({count} runs)" for error, count in _errors(rows).most_common()],
        ),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _by_factor(ran: dict[str, dict[str, Any]], cases: dict[str, Case]) -> Iterator[str]:
    for name in ("family", *FACTORS):
        if name == "model":
            continue
        yield from (f"| {name} | runs | worst at the peak | worst of a phase | beyond the bar |", "| --- " * 5 + "|")
        values: dict[str, list[str]] = {}
        for key in ran:
            values.setdefault(str(cases[key].family if name == "family" else cases[key][name]), []).append(key)
        for value in sorted(values):
            rows = [ran[key] for key in values[value]]
            peak, phase = (max((row["worst"][which] for row in rows), key=abs) for which in (0, 1))
            beyond = sum(bool(row["beyond"]) for row in rows)
            yield f"| {value} | {len(rows)} | {peak:+.2%} | {phase:+.2%} | {beyond} |"
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
    if options.full:
        cases = full_matrix()
    elif options.quick:
        cases = pairwise(
            {name: FACTORS[name] for name in FACTORS if name != "model"}, turns=("model", covered_models())
        )
    else:
        cases = pairwise({**FACTORS, "model": covered_models()})
    run(cases[: options.limit], options.output, options.parallel)


if __name__ == "__main__":
    main()
