"""find_boundaries: the largest micro-batch that really runs under a capacity, beside the largest that the estimator
allows.

On a GPU the capacity is a share of the card (``torch.cuda.set_per_process_memory_fraction``), on the CPU a limit on
the process's data (``RLIMIT_DATA``). Imports no torch: the jobs run in children of a fork server.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from vramplan.errors import SpecError, VramplanError
from vramplan.facts.device import Device, Node
from vramplan.facts.resolve import resolve_architecture
from vramplan.forkserver import Ended, ForkServer
from vramplan.measure.bench import Capacity, local_capacity, record_of, worker_env
from vramplan.measure.record import JobSpec, Record, append_record, read_records
from vramplan.measure.record_spec import run_from_record_spec
from vramplan.memory.estimate import estimate
from vramplan.memory.overhead import HELD_BY_THE_ALLOCATOR
from vramplan.units import TIB

LARGEST_TRIED = 4096
"""Micro-batches above are not tried: the capacity is no bound for such a job."""
Try = Callable[[int], bool]
"""Whether a micro-batch of that many sequences fits."""


@dataclass(frozen=True, slots=True)
class Boundary:
    """The largest micro-batch of one job under its capacity; 0: not even one sequence fits."""

    id: str
    cap_bytes: int
    measured: int | None
    """None where a run ended otherwise than well or out of memory; ``reason`` says how."""
    estimated: int | None
    """None where the estimator does not cover the job; ``reason`` says why."""
    tried: tuple[tuple[int, str], ...]
    """(micro-batch, outcome) of every run, smallest first."""
    reason: str = ""


def find_boundaries(
    jobs: Sequence[JobSpec],
    output: Path,
    *,
    cap_bytes: int | None = None,
    capacity: Capacity | None = None,
    on_run: Callable[[Record], None] = lambda record: None,
) -> Iterator[Boundary]:
    """Each job's boundary, one job after the other; every run is a record in ``output`` and is not run again.

    ``cap_bytes``: for the jobs whose spec has none.

    Raises:
        SpecError: a job has no capacity, or ``output`` holds runs of another spec under the same id.
    """
    capped = [_with_cap(job, cap_bytes) for job in jobs]
    capacity = capacity or local_capacity()
    known = {record.id: record for record in read_records(output)} if output.exists() else {}
    log = output.with_suffix(".log")
    with (
        tempfile.TemporaryDirectory() as scratch,
        ForkServer("vramplan.measure.worker", worker_env(capacity), log) as server,
    ):
        for job in capped:
            yield _Search(job, output, known, server, Path(scratch), on_run).boundary(capacity.device_type)


def largest_that(fits: Try, guess: int = 1, most: int = LARGEST_TRIED) -> int:
    """The largest of 1..``most`` that fits, 0 if none does; what is larger than one that does not fit does not either.

    Starts at ``guess``, whose neighbour settles a right guess with two tries; else doubles away and halves back.
    """
    low, high = 0, most + 1  # low fits, high does not
    number, step = min(max(guess, 1), most), 1
    while high - low > 1:
        if fits(number):
            low = number
        else:
            high = number
        if high > most:
            number, step = min(low + step, most), step * 2
        elif low == 0:
            number, step = max(high - step, 1), step * 2
        else:
            number = (low + high) // 2
    return low


def estimated_largest(job: JobSpec, device_type: str) -> int:
    """The largest micro-batch whose estimate fits the job's capacity.

    What ``RLIMIT_DATA`` and a memory fraction bound is what the allocator holds, not the driver's context beside it.

    Raises:
        VramplanError: the estimator does not cover the job.
    """
    device = Device("any", "cpu" if device_type == "cpu" else "cuda", 1024 * TIB, 1024 * TIB)

    def fits(micro_batch_size: int) -> bool:
        run, layout = run_from_record_spec(job.model_copy(update={"micro_batch_size": micro_batch_size}))
        node = Node(device, gpus_per_node=layout.world_size)
        # a mask that is all ones is dropped (masking_utils.py)
        run = run.model_copy(update={"attention_mask": job.attention_mask and job.masked})
        found = estimate(run, node, resolve_architecture(run), rank=0, managed=True)
        held = sum(term.num_bytes for term in found.overhead if term.name in HELD_BY_THE_ALLOCATOR)
        peak = max(phase.peak_bytes for phase in found.through_steps(job.steps))
        return peak + held <= (job.cap_bytes or 0)

    return largest_that(fits)


class _Search:
    """The runs of one job."""

    def __init__(
        self,
        job: JobSpec,
        output: Path,
        known: dict[str, Record],
        server: ForkServer,
        scratch: Path,
        on_run: Callable[[Record], None],
    ) -> None:
        self._job = job
        self._output = output
        self._known = known
        self._server = server
        self._scratch = scratch
        self._on_run = on_run
        self._outcomes: dict[int, str] = {}

    def boundary(self, device_type: str) -> Boundary:
        measured, estimated, reasons = None, None, []
        try:
            estimated = estimated_largest(self._job, device_type)
        except VramplanError as error:
            reasons.append(str(error))
        try:
            measured = largest_that(self._fits, estimated or 1)
        except _NeitherOkNorOom as error:
            reasons.append(str(error))
        tried = tuple(sorted(self._outcomes.items()))
        return Boundary(self._job.id, self._job.cap_bytes or 0, measured, estimated, tried, "; ".join(reasons))

    def _fits(self, micro_batch_size: int) -> bool:
        name = f"{self._job.id}/micro{micro_batch_size}"
        job = self._job.model_copy(update={"id": name, "micro_batch_size": micro_batch_size})
        record = self._known.get(name)
        if record is None:
            record = self._run(job)
        elif record.spec != job:
            raise SpecError(f"{self._output}: holds a record {name!r} of another spec; give another output file")
        measured = record.measured
        self._outcomes[micro_batch_size] = measured.outcome
        if measured.outcome not in ("ok", "oom"):
            raise _NeitherOkNorOom(f"micro-batch {micro_batch_size} ended as {measured.outcome}: {measured.error}")
        return measured.outcome == "ok"

    def _run(self, job: JobSpec) -> Record:
        out = self._scratch / f"{len(self._known)}.json"
        self._server.submit({"job": job.model_dump(mode="json"), "trace": False}, out)
        ended: list[Ended] = []
        while not ended:
            ended = self._server.wait(timeout_s=1.0)
        record = record_of(job, ended[0])
        append_record(self._output, record)
        self._known[job.id] = record
        self._on_run(record)
        return record


class _NeitherOkNorOom(VramplanError):
    """A run that says nothing about memory."""


def _with_cap(job: JobSpec, cap_bytes: int | None) -> JobSpec:
    if job.cap_bytes is None and cap_bytes is None:
        raise SpecError(f"job {job.id!r}: has no cap_bytes; give it one, or all of them one by --cap")
    if job.undefined_weights or job.halved_weights:  # a boundary is of runs as they are trained
        job = job.model_copy(update={"undefined_weights": False, "halved_weights": False})
    return job if job.cap_bytes is not None else job.model_copy(update={"cap_bytes": cap_bytes})
