"""The jobs of a campaign as `vramplan bench run` would measure them on a GPU, simulated, beside the estimate.

python benchmarks/campaign_simulated.py -o runs/campaign.jsonl
python benchmarks/campaign_simulated.py -o runs/campaign.jsonl --table benchmarks/campaign_simulated.md

Rank 0 in a fake group. The output file keeps what was simulated, which is not run again; ``--table`` compares it with
the estimates as they are now.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from vramplan.errors import VramplanError
from vramplan.facts.device import Node
from vramplan.facts.gpu_catalogue import find_device
from vramplan.facts.resolve import resolve_architecture
from vramplan.measure.compare import quantile
from vramplan.measure.record import JobSpec, read_jobs
from vramplan.measure.record_spec import run_from_record_spec
from vramplan.memory.estimate import estimate
from vramplan.memory.ledger import Estimate, PhaseBytes
from vramplan.simulate.request import SimulationRequest, record_request, simulate_jobs

from support.matrix import PEAK_FRAC, PHASE_FRAC, beyond_the_bar, differences

CAMPAIGN = Path(__file__).with_name("campaigns") / "gpu.jsonl"


def estimate_of(job: JobSpec, gpu: str) -> Estimate:
    """As ``vramplan compare`` estimates the job's record.

    Raises:
        VramplanError: the estimator does not cover it.
    """
    run, layout = run_from_record_spec(job)
    run = run.model_copy(update={"attention_mask": job.attention_mask and job.masked})
    node = Node(find_device(gpu), gpus_per_node=layout.world_size)
    return estimate(run, node, resolve_architecture(run), rank=0, managed=True)


def request_of(job: JobSpec) -> SimulationRequest:
    """As ``vramplan compare --simulate`` asks, but deep models are followed from fewer layers where that is exact."""
    request = record_request(run_from_record_spec(job)[0], key=job.id, steps=job.steps, masked=job.masked)
    return replace(request, device_type="cuda", conditions=replace(request.conditions, by_depth=True))


def run(jobs: Sequence[JobSpec], path: Path, gpu: str, parallel: int) -> None:
    done = rows_of(path)
    todo = [job for job in jobs if job.id not in done]
    with path.open("a", encoding="utf-8") as file:
        for key, found in simulate_jobs(map(request_of, todo), parallel):
            phases = [] if found.error else [[each.phase, each.peak_bytes, each.end_bytes] for each in found.phases]
            row = {"job": key, "error": found.error, "in_full_because": found.in_full_because, "phases": phases}
            file.write(json.dumps(row) + "\n")
            file.flush()
            job = next(job for job in todo if job.id == key)
            print(line(job, row, gpu), flush=True)


def rows_of(path: Path) -> dict[str, dict[str, Any]]:
    if not path.exists():
        return {}
    return {row["job"]: row for row in map(json.loads, path.read_text(encoding="utf-8").splitlines())}


def estimated(job: JobSpec, gpu: str) -> Estimate | str:
    """The estimate, or why there is none."""
    try:
        return estimate_of(job, gpu)
    except VramplanError as error:
        return str(error)


def line(job: JobSpec, row: dict[str, Any], gpu: str) -> str:
    """A row of the table: the worst figures, or why there are none."""
    what = f"| {job.id} | {job.model.name.rpartition('/')[2]} | {job.method.kind} | {job.zero.stage} | {job.world.dp} "
    if row["error"]:
        return f"{what}| - | - | not simulated: {row['error']} |"
    found = estimated(job, gpu)
    if isinstance(found, str):
        return f"{what}| - | - | not estimated: {found} |"
    simulated = [PhaseBytes(*phase) for phase in row["phases"]]
    peak, *phases = differences(found, simulated)
    worst = max(phases, key=lambda each: abs(each.error_frac))
    beyond = "; ".join(str(each) for each in beyond_the_bar(found, simulated)[:3])
    return f"{what}| {peak.error_frac:+.3%} | {worst.error_frac:+.3%} ({worst.what}) | {beyond} |"


def table(jobs: Sequence[JobSpec], path: Path, gpu: str) -> str:
    rows = {job.id: row for job in jobs if (row := rows_of(path).get(job.id)) is not None}
    peaks, beyond = [], 0
    for job in jobs:
        found = estimated(job, gpu)
        if job.id in rows and not rows[job.id]["error"] and not isinstance(found, str):
            simulated = [PhaseBytes(*phase) for phase in rows[job.id]["phases"]]
            peaks.append(abs(next(iter(differences(found, simulated))).error_frac))
            beyond += bool(beyond_the_bar(found, simulated))
    peaks.sort()
    return "\n".join(
        [
            "# A campaign for a GPU, simulated",
            "",
            f"`python benchmarks/campaign_simulated.py` on {CAMPAIGN.name}, rank 0, {gpu}: {len(rows)} of {len(jobs)} "
            f"jobs simulated, {len(peaks)} of them to their end and estimated. |error| of the estimate's peak: median "
            f"{quantile(peaks, 0.5):.3%}, 95th percentile {quantile(peaks, 0.95):.3%}, worst {peaks[-1]:.2%}; "
            f"{beyond} beyond the bar ({PEAK_FRAC:.0%} at the peak, {PHASE_FRAC:.0%} of a phase).",
            "",
            "| job | model | method | ZeRO | ranks | peak | worst of a phase | beyond the bar |",
            "| --- | --- | --- | --- | --- | --- | --- | --- |",
            *(line(job, rows[job.id], gpu) for job in jobs if job.id in rows),
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--jobs", type=Path, default=CAMPAIGN)
    parser.add_argument("--gpu", default="h100-80gb")
    parser.add_argument("--parallel", type=int, default=1)
    parser.add_argument("--table", type=Path, help="write the comparison instead of simulating")
    args = parser.parse_args()
    jobs = read_jobs(args.jobs)
    if args.table:
        args.table.write_text(table(jobs, args.output, args.gpu), encoding="utf-8")
    else:
        run(jobs, args.output, args.gpu, args.parallel)


if __name__ == "__main__":
    main()
