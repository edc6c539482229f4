"""One measuring job: plays rank 0 of its layout for real and writes its record."""

from __future__ import annotations

import importlib.metadata
import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from vramplan.errors import VramplanError
from vramplan.measure.probe import PhaseProbe
from vramplan.measure.record import JobSpec, Measured, Outcome, Record, peaks_of
from vramplan.measure.record_spec import run_from_record_spec
from vramplan.measure.trace import BirthReader, largest_live
from vramplan.rank.play import RankPlayer

LIVE_ROWS = 200
"""Rows of live tensors kept for each phase of a traced job, largest first."""


def measure_job(spec: JobSpec, out: Path, *, trace: bool = False) -> Record:
    """Runs the job in this process, whose device context must be fresh; ``out`` holds the record after every phase.

    Out of memory and errors are outcomes of the record, not exceptions.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    job = _Job(spec, out, device, trace)
    job.write("died")  # what stands there if the process ends without a word
    outcome, error = job.run()
    return job.write(outcome, error)


class _Job:
    def __init__(self, spec: JobSpec, out: Path, device: torch.device, trace: bool) -> None:
        self.spec = spec
        self.out = out
        self.device = device
        self.births = BirthReader() if trace else None
        self.context_bytes = _prepare_device(device, spec)
        self.probe = PhaseProbe(device, births=self.births)
        run, layout = run_from_record_spec(spec)
        self.player = RankPlayer(run, layout, self.phase, device=str(device), steps=spec.steps, padded=spec.masked)
        self.player.undefined_weights = spec.undefined_weights
        self.player.halved_weights = spec.halved_weights

    def run(self) -> tuple[Outcome, str | None]:
        try:
            with self.probe:
                self.player.play()
        except torch.cuda.OutOfMemoryError as error:
            return "oom", _one_line(error)
        except MemoryError:
            return "oom", "MemoryError"
        except Exception as error:  # noqa: BLE001 - whatever a job dies of is its outcome
            return ("oom" if _is_cpu_oom(error) else "error"), _one_line(error)
        return "ok", None

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        with self.probe.phase(name):
            yield
        if name == "model_load" and self.births is not None and self.player.model is not None:
            self.births.name_modules(self.player.model.named_modules())
        self.write("died")

    def write(self, outcome: Outcome, error: str | None = None) -> Record:
        record = Record(self.spec.id, self.spec, self._measured(outcome, error), self._env())
        partial = self.out.with_suffix(".partial")
        partial.write_text(json.dumps(record.to_dict()), encoding="utf-8")
        partial.replace(self.out)
        return record

    def _measured(self, outcome: Outcome, error: str | None) -> Measured:
        played, phases = self.player.played, tuple(self.probe.readings)
        measured = Measured(
            outcome=outcome,
            phases=phases,
            numel_total=played.numel_total,
            numel_trainable=played.numel_trainable,
            host_rss_peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            seconds_per_step=played.seconds_per_step or None,
            context_bytes_total_minus_free=self.context_bytes,
            error=error,
        )
        measured = replace(measured, **peaks_of(phases))  # type: ignore[arg-type]
        if self.probe.live_at_peak:
            live = {phase: largest_live(blocks, LIVE_ROWS) for phase, blocks in self.probe.live_at_peak.items()}
            measured = replace(measured, extra={"live_at_peak": live})
        return measured

    def _env(self) -> dict[str, Any]:
        versions = {name: _version(name) for name in ("torch", "deepspeed", "transformers", "peft")}
        return versions | {
            "device_type": self.device.type,
            "device_name": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu",
            "backend": "fake",
            "alloc_conf": self.spec.alloc_conf,
        }


def _prepare_device(device: torch.device, spec: JobSpec) -> int | None:
    """Sets the allocator and the cap; bytes of driver memory in use before the first tensor (None on the CPU)."""
    if device.type == "cpu":
        if spec.cap_bytes is not None:
            limit = _data_bytes() + spec.cap_bytes
            resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.RLIM_INFINITY))
        return None
    if spec.alloc_conf:
        # torch was imported before the fork and may have read the environment then
        torch._C._accelerator_setAllocatorSettings(spec.alloc_conf)
    torch.cuda.init()
    free, total = torch.cuda.mem_get_info(device)
    if spec.cap_bytes is not None:
        torch.cuda.set_per_process_memory_fraction(min(1.0, spec.cap_bytes / total), device)
    return total - free


def _data_bytes() -> int:
    """Private writable bytes of this process, which RLIMIT_DATA counts (proc(5), ``VmData``)."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmData:"):
            return int(line.split()[1]) * 1024
    raise VramplanError("a cap on the CPU needs /proc/self/status with VmData, which only Linux has")


def _is_cpu_oom(error: Exception) -> bool:
    """c10's CPU allocator and C++'s ``bad_alloc`` reach Python as plain RuntimeErrors."""
    text = str(error)
    return isinstance(error, RuntimeError) and ("can't allocate memory" in text or "bad_alloc" in text)


def _one_line(error: BaseException) -> str:
    first = str(error).strip().splitlines()
    return f"{type(error).__name__}: {first[0] if first else ''}"


def _version(package: str) -> str:
    if package == "torch":
        return str(torch.__version__)  # with the build, e.g. +cpu
    return importlib.metadata.version(package)
