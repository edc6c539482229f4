"""``vramplan bench``: measure jobs for real and write records."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vramplan.errors import SpecError

bench = typer.Typer(no_args_is_help=True, add_completion=False)


@bench.command()
def run(
    jobs: Annotated[Path, typer.Argument(help="JSONL, one job's spec a line (a records file will do).")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Records file; what it holds is not run again.")],
    only: Annotated[list[str] | None, typer.Option("--only", help="Run the job of this id; repeatable.")] = None,
    parallel: Annotated[
        int | None, typer.Option("--parallel", min=1, help="Jobs at once, if memory allows (default: cores / 2).")
    ] = None,
    trace: Annotated[
        bool,
        typer.Option("--trace", help="Also record the live tensors at each phase's peak and where they were born."),
    ] = False,
) -> None:
    """Run each job in its own process and write its record; out of memory is a result."""
    from vramplan.measure.bench import local_capacity, pending_jobs, run_jobs, summary
    from vramplan.measure.record import read_jobs

    asked = [job for job in read_jobs(jobs) if not only or job.id in only]
    if not asked:
        raise SpecError(f"{jobs}: has no job {' or '.join(only)}" if only else f"{jobs}: has no job")
    pending = pending_jobs(asked, output)
    if len(pending) < len(asked):
        typer.echo(f"{len(asked) - len(pending)} of {len(asked)} jobs are in {output} already", err=True)
    records = []
    with _progress(len(pending)) as progress:
        for record in run_jobs(
            pending, output, trace=trace, capacity=local_capacity(parallel), on_start=progress.started
        ):
            records.append(record)
            progress.ended(record)
    said = ", ".join(f"{count} {outcome}" for outcome, count in summary(records).items())
    typer.echo(f"{output}: {len(records)} new records{f' ({said})' if said else ''}", err=True)


@bench.command()
def boundary(
    jobs: Annotated[Path, typer.Argument(help="JSONL, one job's spec a line (a records file will do).")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Records of every run; none is run again.")],
    cap: Annotated[str | None, typer.Option("--cap", help="Capacity of jobs without cap_bytes, such as 24GiB.")] = None,
    only: Annotated[list[str] | None, typer.Option("--only", help="The job of this id; repeatable.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Find the largest micro-batch that really runs under a capacity, beside the largest the estimator allows."""
    from vramplan.cli.output import show_json
    from vramplan.cli.tables import print_table
    from vramplan.measure.boundary import find_boundaries
    from vramplan.measure.record import read_jobs
    from vramplan.report.boundary import boundary_table, boundary_to_dict, run_line
    from vramplan.units import parse_bytes

    asked = [job for job in read_jobs(jobs) if not only or job.id in only]
    if not asked:
        raise SpecError(f"{jobs}: has no job {' or '.join(only)}" if only else f"{jobs}: has no job")
    try:
        cap_bytes = parse_bytes(cap) if cap else None
    except ValueError as error:
        raise SpecError(f"--cap: {error}") from error
    found = list(
        find_boundaries(
            asked, output, cap_bytes=cap_bytes, on_run=lambda record: typer.echo(run_line(record), err=True)
        )
    )
    if json:
        show_json([boundary_to_dict(each) for each in found])
    else:
        print_table(boundary_table(found))


@bench.command()
def live(
    records: Annotated[Path, typer.Argument(help="Records written by `vramplan bench run --trace`.")],
    record_id: Annotated[str | None, typer.Argument(metavar="[ID]", help="Which record (default: the first).")] = None,
    phase: Annotated[str | None, typer.Option(help="Which phase (default: the one with the highest peak).")] = None,
    rows: Annotated[int, typer.Option("-n", "--rows", min=1, help="How many rows.")] = 30,
) -> None:
    """List the tensors alive at a phase's peak, largest first, with where they were born."""
    from vramplan.cli.tables import print_note, print_table
    from vramplan.measure.record import read_records
    from vramplan.report.live import live_table

    found = [record for record in read_records(records) if record_id in (None, record.id)]
    if not found:
        raise SpecError(f"{records}: has no record {record_id!r}")
    measured = found[0].measured
    traced = measured.extra.get("live_at_peak", {})
    if not traced:
        raise SpecError(f"{records}: record {found[0].id!r} has no live tensors; measure it with --trace")
    phase = phase or max(measured.phases, key=lambda reading: reading.allocated_peak_bytes).phase
    if phase not in traced:
        raise SpecError(f"--phase {phase}: record {found[0].id!r} has the phases {', '.join(traced)}")
    peak = next(reading.allocated_peak_bytes for reading in measured.phases if reading.phase == phase)
    print_table(live_table(traced[phase][:rows], peak))
    print_note(f"{found[0].id}, peak of {phase}: {peak} bytes")


class _progress:  # noqa: N801 - used as a function
    """A progress bar on stderr that names the jobs that run; quiet lines where stderr is no terminal."""

    def __init__(self, total: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self._running: list[str] = []
        self._bar = Progress(
            MofNCompleteColumn(),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}"),
            console=Console(stderr=True),
        )
        self._task = self._bar.add_task("", total=total)

    def __enter__(self) -> _progress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def started(self, job: object) -> None:
        self._running.append(str(getattr(job, "id", job)))
        self._show()

    def ended(self, record: object) -> None:
        from vramplan.measure.record import Record
        from vramplan.units import format_bytes

        assert isinstance(record, Record)
        self._running.remove(record.id)
        measured = record.measured
        peak = format_bytes(measured.train_allocated_peak_bytes or measured.allocated_peak_bytes or 0)
        self._bar.console.print(f"{record.id}: {measured.outcome}, {peak} {measured.error or ''}", highlight=False)
        self._bar.advance(self._task)
        self._show()

    def _show(self) -> None:
        self._bar.update(self._task, description=" ".join(self._running))
