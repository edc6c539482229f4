"""GPU memory that others measured and published, beside the estimate.

    python benchmarks/published.py published.jsonl [--json] [--quality A] [-o benchmarks/published.md]

Each source of rows has one mapping to specs (``published_sources.py``); a row that none covers is listed with its
reason. Allocated bytes are compared as errors; readings that depend on the allocator's history (reserved, nvidia-smi)
by whether they lie in the band that the estimate states; ``fits`` and ``oom`` by the verdict.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from published_sources import Asked, mapped

from vramplan.errors import VramplanError
from vramplan.facts.resolve import resolve_architecture
from vramplan.measure.compare import Summary, summarize
from vramplan.memory.cut import tied_head_part
from vramplan.memory.estimate import estimate
from vramplan.memory.from_run import job_from_run
from vramplan.memory.ledger import Estimate

ALLOCATED = ("max_allocated", "alive_allocated")
BANDS = {"max_reserved": "reserved_band", "nvidia_smi": "used_band"}


@dataclass(frozen=True, slots=True)
class Compared:
    """One row: what was printed, and what is predicted; ``reason`` where nothing is."""

    id: str
    source: str
    kind: str
    measured_bytes: int | None = None
    predicted_bytes: int | None = None
    band: tuple[int, int] | None = None
    fits: bool | None = None
    reason: str = ""

    @property
    def covered(self) -> bool:
        return not self.reason

    @property
    def error_frac(self) -> float | None:
        if self.predicted_bytes is None or not self.measured_bytes:
            return None
        return self.predicted_bytes / self.measured_bytes - 1

    @property
    def right(self) -> bool | None:
        """Whether the band holds the reading, or the verdict is the row's; None for allocated bytes."""
        if self.band is not None and self.measured_bytes is not None:
            return self.band[0] <= self.measured_bytes <= self.band[1]
        return None if self.fits is None else self.fits == (self.kind == "fits")


def compare_row(row: dict[str, Any]) -> Compared:
    """One row beside its estimate."""
    kind, measured = row["measured"]["kind"], row["measured"].get("bytes_interpreted")
    named = Compared(row["id"], source_of(row), kind, measured)
    try:
        asked = mapped(row)
        if isinstance(asked, str):
            return _without(named, asked)
        found = estimate(asked.run, asked.node, resolve_architecture(asked.run), rank=asked.rank)
    except VramplanError as error:
        return _without(named, str(error))
    return _read(named, asked, found)


def _without(named: Compared, reason: str) -> Compared:
    return Compared(named.id, named.source, named.kind, named.measured_bytes, reason=reason)


def _read(named: Compared, asked: Asked, found: Estimate) -> Compared:
    kind = named.kind
    fields: dict[str, Any] = {"id": named.id, "source": named.source, "kind": kind}
    if kind in ALLOCATED:
        phases = {phase.phase: phase for phase in found.phases}
        if asked.phase is not None:
            phase = phases[asked.phase]
            predicted = phase.peak_bytes if kind == "max_allocated" else phase.end_bytes - _collected(asked)
        elif kind == "max_allocated":
            predicted = found.train_allocated_peak_bytes
        else:
            predicted = found.phases[-1].end_bytes
        computed = 0 if asked.phase in ("model_load", "engine_init") else found.workspace_bytes
        return Compared(**fields, measured_bytes=named.measured_bytes, predicted_bytes=predicted + computed)
    if kind in BANDS:
        band = getattr(found, BANDS[kind])
        return Compared(
            **fields,
            measured_bytes=named.measured_bytes,
            predicted_bytes=found.used_peak_bytes,
            band=(asked.times * band.low_bytes, asked.times * band.high_bytes),
        )
    return Compared(**fields, predicted_bytes=found.used_peak_bytes, fits=found.fits)


def _collected(asked: Asked) -> int:
    """DeepSpeed collects Python's garbage before it reads what is alive (runtime/utils.py:835, ``see_memory_usage``),
    and with it what loading under ZeRO-3 leaves of a tied head."""
    job = job_from_run(asked.run, asked.node, resolve_architecture(asked.run))
    stays = asked.phase == "model_load" and job.stage == 3 and not (job.offload_param and job.device != "cpu")
    return tied_head_part(job) if stays else 0


def source_of(row: dict[str, Any]) -> str:
    """The source without the line or file that tells its rows apart."""
    return str(row["source"]).split(" line ")[0].split(":")[0].split("@")[0].split(" (")[0]


def table(rows: Iterable[Compared]) -> list[dict[str, Any]]:
    """One line for each kind of figure and source."""
    groups: dict[tuple[str, str], list[Compared]] = defaultdict(list)
    for row in rows:
        groups[row.kind, row.source].append(row)
    return [_line(kind, source, found) for (kind, source), found in sorted(groups.items())]


def _line(kind: str, source: str, found: list[Compared]) -> dict[str, Any]:
    errors = [row.error_frac for row in found if row.covered and row.kind in ALLOCATED and row.error_frac is not None]
    summary: Summary = summarize(errors, len(found))
    judged = [row.right for row in found if row.covered and row.right is not None]
    return {
        "kind": kind,
        "source": source,
        "rows": len(found),
        "covered": sum(row.covered for row in found),
        "median_abs_error_frac": summary.median_abs_error_frac,
        "p95_abs_error_frac": summary.p95_abs_error_frac,
        "worst_under_frac": summary.worst_under_frac,
        "worst_over_frac": summary.worst_over_frac,
        "right": sum(judged) if judged else None,
        "reasons": sorted({row.reason for row in found if row.reason}),
    }


def as_markdown(lines: list[dict[str, Any]], rows: list[Compared], file: str, quality: str) -> str:
    """The table, the rows that are off, and why the rest is not compared."""
    text = [
        "# What others measured on GPUs, beside the estimate",
        "",
        f"Made by `python benchmarks/published.py {file}`: rows of quality {quality}, transformers' own model code, "
        "one GPU without DeepSpeed or DeepSpeed. Allocated bytes: (predicted - measured) / measured. Reserved and "
        "nvidia-smi: how many lie in the band that the estimate states. The band is wide, and its upper end was set "
        "with these very rows in view, so that lying in it proves little. fits and oom: how many verdicts are the "
        "row's.",
        "",
        "| figure | source | rows | compared | median error | 95th percentile | worst under | worst over | right |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for line in lines:
        errors = [line[name] for name in ("median_abs_error_frac", "p95_abs_error_frac", "worst_under_frac")]
        cells = [_percent(value) for value in (*errors, line["worst_over_frac"])]
        right = "" if line["right"] is None else f"{line['right']} of {line['covered']}"
        counts = [str(line["rows"]), str(line["covered"])]
        text.append(f"| {' | '.join([line['kind'], line['source'], *counts, *cells, right])} |")
    text += ["", "## Not compared", ""]
    for line in lines:
        text += [f"- {line['kind']}, {line['source']}: {reason}" for reason in line["reasons"]]
    text += ["", "## Off by more than 3%, outside the band, or another verdict", ""]
    text += [f"- {describe(row)}" for row in rows if is_off(row)]
    return "\n".join(text) + "\n"


def is_off(row: Compared) -> bool:
    """Whether a covered row misses."""
    if row.kind in ALLOCATED:
        return row.error_frac is not None and abs(row.error_frac) > 0.03
    return row.right is False


def describe(row: Compared) -> str:
    """One row in a line."""
    gib = 2**30
    measured = "" if row.measured_bytes is None else f" measured {row.measured_bytes / gib:.2f} GiB,"
    predicted = 0 if row.predicted_bytes is None else row.predicted_bytes / gib
    band = "" if row.band is None else f" (band {row.band[0] / gib:.2f} to {row.band[1] / gib:.2f})"
    error = "" if row.error_frac is None or row.band is not None else f" ({row.error_frac:+.1%})"
    return f"{row.id} {row.kind}:{measured} predicted {predicted:.2f} GiB{error}{band}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def is_judged(row: dict[str, Any], qualities: str) -> bool:
    """Rows that a bar is about: transformers' model code, on one GPU without DeepSpeed or with DeepSpeed."""
    own_code = bool(row["other"].get("hf_stack"))
    return row["quality"] in qualities and row["engine"] in ("single", "deepspeed") and own_code


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--json", action="store_true", help="print the lines and every row as JSON")
    parser.add_argument("--quality", default="A", help="marks of the rows to compare, such as AB")
    parser.add_argument("-o", "--output", type=Path, help="write the table there too")
    given = parser.parse_args()
    try:
        raw = [json.loads(line) for line in given.file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        print(f"published.py: {given.file}: cannot be read as JSON lines ({error})", file=sys.stderr)
        return 2
    rows = [compare_row(row) for row in raw if is_judged(row, given.quality)]
    lines = table(rows)
    markdown = as_markdown(lines, rows, given.file.name, given.quality)
    if given.json:
        every = [asdict(row) | {"error_frac": row.error_frac, "right": row.right} for row in rows]
        print(json.dumps({"summary": lines, "rows": every}, indent=1))
    else:
        print(markdown, end="")
    if given.output is not None:
        given.output.write_text(markdown, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
