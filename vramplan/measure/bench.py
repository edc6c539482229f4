"""run_jobs: measures the jobs of a file, each in its own process, several at a time where memory allows.

Imports no torch: the jobs run in children of a fork server.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vramplan.errors import VramplanError
from vramplan.facts.device import Device, Node
from vramplan.facts.host import read_host
from vramplan.facts.nvml import read_driver
from vramplan.facts.resolve import resolve_architecture
from vramplan.forkserver import Ended, ForkServer
from vramplan.measure.record import JobSpec, Measured, Record, append_record, read_records
from vramplan.measure.record_spec import run_from_record_spec
from vramplan.units import GIB, MIB, TIB

PROCESS_BYTES = 1 * GIB
"""Host memory of a job's process beside its tensors: the interpreter, torch and DeepSpeed (0.6 GiB seen)."""
NEED_MARGIN = 1.1
"""A job is started beside others only if its estimate times this is free: estimates err by a few percent."""


@dataclass(frozen=True, slots=True)
class Capacity:
    """What jobs share: bytes of the device they run on, and how many may run at once."""

    device_type: str
    num_bytes: int
    max_jobs: int


def local_capacity(max_jobs: int | None = None) -> Capacity:
    """The first GPU if the driver shows one, else the host's memory. One job per two cores at most."""
    host = read_host()
    default_jobs = max(1, host.num_cpus // 2)
    driver = read_driver()
    if driver is not None and driver.gpus:
        gpu = driver.gpus[0]
        return Capacity("cuda", gpu.free_bytes, max_jobs or default_jobs)
    known = [size for size in (host.memory_available_bytes, host.memory_limit_bytes) if size is not None]
    return Capacity("cpu", min(known, default=4 * GIB), max_jobs or default_jobs)


def pending_jobs(jobs: Sequence[JobSpec], output: Path) -> list[JobSpec]:
    """The jobs that the output file has no record of; a record whose spec differs from its job's is an error."""
    if not output.exists():
        return list(jobs)
    done = {record.id: record.spec for record in read_records(output)}
    for job in jobs:
        if job.id in done and done[job.id] != job:
            raise VramplanError(f"{output}: holds a record {job.id!r} of another spec; give another output file")
    return [job for job in jobs if job.id not in done]


def run_jobs(
    jobs: Sequence[JobSpec],
    output: Path,
    *,
    trace: bool = False,
    capacity: Capacity | None = None,
    on_start: Callable[[JobSpec], None] = lambda job: None,
) -> Iterator[Record]:
    """Runs every job and yields its record when it has ended and been appended to ``output``.

    Out of memory, errors and deaths are outcomes of the records. Interrupting loses only what runs.
    """
    capacity = capacity or local_capacity()
    env = worker_env(capacity)
    log = output.with_suffix(".log")
    with tempfile.TemporaryDirectory() as scratch, ForkServer("vramplan.measure.worker", env, log) as server:
        schedule = _Schedule(list(jobs), capacity, Path(scratch))
        while schedule.waiting or schedule.running:
            for job, out in schedule.startable():
                on_start(job)
                server.submit({"job": job.model_dump(mode="json"), "trace": trace}, out)
            for ended in server.wait(timeout_s=1.0):
                record = schedule.finish(ended)
                append_record(output, record)
                yield record


def needed_bytes(job: JobSpec) -> int | None:
    """Bytes of the device that the job's rank is estimated to use; None where the estimator does not know."""
    if job.cap_bytes is not None:
        return job.cap_bytes
    run, _ = run_from_record_spec(job)
    boundless = Device(name="any", kind="cpu", memory_bytes=TIB * 1024, usable_bytes=TIB * 1024)
    try:
        from vramplan.memory.estimate import estimate

        node, architecture = Node(device=boundless, gpus_per_node=1), resolve_architecture(run)
        found = estimate(run, node, architecture, weights_halved=job.halved_weights, managed=True)
    except (VramplanError, ImportError):
        return None
    return max(phase.peak_bytes for phase in found.phases)


class _Schedule:
    """Which jobs may run now: those whose estimates fit together; one of unknown need runs alone."""

    def __init__(self, jobs: list[JobSpec], capacity: Capacity, scratch: Path) -> None:
        self.waiting = jobs
        self.running: dict[Path, tuple[JobSpec, int]] = {}
        self._capacity = capacity
        self._scratch = scratch
        self._started = 0

    def startable(self) -> Iterator[tuple[JobSpec, Path]]:
        while self.waiting and len(self.running) < self._capacity.max_jobs:
            job = self.waiting[0]
            need = self._need(job)
            if self.running and need + sum(other for _, other in self.running.values()) > self._capacity.num_bytes:
                return
            del self.waiting[0]
            self._started += 1
            out = self._scratch / f"{self._started}.json"
            self.running[out] = (job, need)
            yield job, out

    def finish(self, ended: Ended) -> Record:
        job, _ = self.running.pop(ended.out)
        return record_of(job, ended)

    def _need(self, job: JobSpec) -> int:
        need = needed_bytes(job)
        if need is None:
            return self._capacity.num_bytes
        own = PROCESS_BYTES if self._capacity.device_type == "cpu" else 700 * MIB
        return int(need * NEED_MARGIN) + own


def record_of(job: JobSpec, ended: Ended) -> Record:
    """The record that a child left, or one that says how it died."""
    if ended.out.exists():
        raw = json.loads(ended.out.read_text(encoding="utf-8"))
        record = Record(job.id, job, Measured.from_dict(raw["measured"]), raw["env"])
    else:
        record = Record(job.id, job, Measured(outcome="died"))
    if record.measured.outcome == "died":
        how = _how_it_died(ended.exit_code)
        record = replace(record, measured=replace(record.measured, error=how))
    return record


def worker_env(capacity: Capacity) -> dict[str, str]:
    """Variables of the process that runs jobs."""
    return {"DS_ACCELERATOR": "cpu"} if capacity.device_type == "cpu" else {}


def _how_it_died(exit_code: int) -> str:
    if exit_code == -9:
        return "killed by signal 9: most often the kernel's, when host memory ran out"
    return f"killed by signal {-exit_code}" if exit_code < 0 else f"ended with exit code {exit_code} (see the log)"


def summary(records: Sequence[Record]) -> dict[str, Any]:
    """How many records of each outcome."""
    outcomes = [record.measured.outcome for record in records]
    return {outcome: outcomes.count(outcome) for outcome in sorted(set(outcomes))}
