"""Why a run ended: from what the ranks wrote down, in one sentence."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vramplan.errors import RunFailedError
from vramplan.measure.run_dir import RunDir

_LOG_LINES = 3
_OUT_OF_MEMORY = (
    "CUDA out of memory",  # the caching allocator
    "CUDA error: out of memory",  # the driver
    "CUBLAS_STATUS_ALLOC_FAILED",  # a workspace of cuBLAS
    "'out of memory'",  # NCCL: Cuda failure 2 'out of memory'
    "DefaultCPUAllocator: can't allocate memory",
    "std::bad_alloc",
)


@dataclass(frozen=True, slots=True)
class Failure:
    """What a rank wrote when it ended; ``by_user``: its message is a sentence for the user as it stands."""

    rank: int
    phase: str
    kind: str
    message: str
    by_user: bool
    exit_code: int
    time: float

    @property
    def is_out_of_memory(self) -> bool:
        """By the type that torch raises, and by the texts of what is raised as a plain RuntimeError."""
        return self.kind == "OutOfMemoryError" or any(text in self.message for text in _OUT_OF_MEMORY)

    @classmethod
    def read(cls, path: Path) -> Failure:
        raw: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return cls(**{name: raw[name] for name in cls.__dataclass_fields__})


class TrainingFailed(RunFailedError):
    """A run that ended early; ``exit_code`` is 2 where the user's input is at fault, else 3."""

    def __init__(self, text: str, exit_code: int = RunFailedError.exit_code) -> None:
        super().__init__(text)
        self.exit_code = exit_code


def first_failure(run_dir: RunDir) -> Failure | None:
    """The failure that was first: others follow from it (a rank whose peer is gone fails too)."""
    failures = list(_failures(run_dir))
    named = [failure for failure in failures if failure.by_user]
    return min(named or failures, key=lambda failure: failure.time, default=None)


def explain(run_dir: RunDir, launcher_code: int | None) -> TrainingFailed:
    """The error to raise after a launcher that ended with ``launcher_code`` without the run being finished."""
    failure = first_failure(run_dir)
    if failure is None:
        return _explain_silence(run_dir, launcher_code)
    if failure.by_user:
        return TrainingFailed(failure.message, failure.exit_code)
    first_line = next((line for line in failure.message.splitlines() if line.strip()), "no message")
    log = log_of(run_dir, failure.rank)
    if failure.is_out_of_memory:
        return TrainingFailed(
            f"rank {failure.rank} ran out of memory in {failure.phase}: {first_line} (log: {log}); plan again with a "
            "lower --memory-cap or --micro-batch"
        )
    return TrainingFailed(f"rank {failure.rank} failed in {failure.phase}: {failure.kind}: {first_line} (log: {log})")


def log_of(run_dir: RunDir, rank: int) -> Path:
    """The newest output of a rank; the launcher's where the rank has none."""
    of_rank = sorted(run_dir.logs.glob(f"*_rank{rank}.log"))
    return of_rank[-1] if of_rank else run_dir.logs / "launcher.log"


def _failures(run_dir: RunDir) -> Iterator[Failure]:
    for path in sorted(run_dir.ranks.glob("rank*.failure.json")):
        # A full disk or a cut copy leaves half a file: what the other ranks said still counts.
        with suppress(ValueError, KeyError):
            yield Failure.read(path)


def _explain_silence(run_dir: RunDir, launcher_code: int | None) -> TrainingFailed:
    """No rank said why: it was killed, or never started."""
    phases = [_phase(path) for path in sorted(run_dir.ranks.glob("rank*.status.json"))]
    log = run_dir.logs / "launcher.log"
    if not phases:
        last = _last_lines(log) or "it wrote nothing"
        return TrainingFailed(
            f"the launcher ended with code {launcher_code} before any rank started: {last} (log: {log})"
        )
    where = ", ".join(f"rank {rank} in {phase}" for rank, phase in enumerate(phases))
    return TrainingFailed(
        f"the run was ended from outside (launcher's code {launcher_code}; {where}): a process was killed, by hand or "
        f"for want of host memory (log: {log})"
    )


def _phase(path: Path) -> str:
    """Said to be unknown for a rank that was killed between opening its file and its first write."""
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["phase"])
    except ValueError:
        return "a phase unknown"


def _last_lines(log: Path) -> str:
    if not log.exists():
        return ""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return " | ".join(lines[-_LOG_LINES:])
