"""Why a run ended, in one sentence for the user."""

from __future__ import annotations

import json
from pathlib import Path

from vramplan.errors import RunFailedError
from vramplan.measure.marker import Marker
from vramplan.measure.run_dir import RunDir
from vramplan.supervise.classify import Evidence, Verdict, bytes_clause, classify
from vramplan.supervise.evidence import collect, log_of, read_markers
from vramplan.supervise.watch import Trouble

_LOG_LINES = 3


class TrainingFailed(RunFailedError):
    """A run that ended early; ``exit_code`` is 2 where the user's input is at fault, else 3.

    ``verdict``: the cause; None where the run never started or the user ended it.
    """

    def __init__(self, text: str, exit_code: int = RunFailedError.exit_code, verdict: Verdict | None = None) -> None:
        super().__init__(text)
        self.exit_code = exit_code
        self.verdict = verdict


def first_failure(run_dir: RunDir) -> Marker | None:
    """The marker that tells the cause: others follow from it (a rank whose peer is gone fails too)."""
    return classify(Evidence(launcher_code=1, markers=tuple(read_markers(run_dir)))).marker


def explain(
    run_dir: RunDir, launcher_code: int | None, trouble: Trouble | None = None, oom_kills: int = 0
) -> TrainingFailed:
    """The error to raise after a launcher that ended with ``launcher_code`` without the run being finished."""
    found = collect(run_dir, launcher_code, trouble or Trouble(), oom_kills)
    if not found.markers and not found.ranks and not found.silent and not _has_status(run_dir):
        return _never_started(run_dir, launcher_code)
    verdict = classify(found)
    return TrainingFailed(_sentence(run_dir, found, verdict), _exit_code(verdict), verdict)


def _sentence(run_dir: RunDir, found: Evidence, verdict: Verdict) -> str:
    marker = verdict.marker
    if marker is None:
        return f"{_silence(run_dir, found, verdict)} (log: {_log(run_dir, verdict)})"
    if marker.by_user:
        return marker.message
    first_line = next((line for line in marker.message.splitlines() if line.strip()), "no message")
    log = log_of(run_dir, marker.rank)
    if verdict.is_memory:
        return (
            f"rank {marker.rank} ran out of memory in {marker.phase}: {first_line} "
            f"({verdict.cause.value}{bytes_clause(verdict.memory)}; log: {log})"
        )
    return f"rank {marker.rank} failed in {marker.phase}: {marker.kind}: {first_line} (log: {log})"


def _exit_code(verdict: Verdict) -> int:
    marker = verdict.marker
    return marker.exit_code if marker is not None and marker.by_user else RunFailedError.exit_code


def _silence(run_dir: RunDir, found: Evidence, verdict: Verdict) -> str:
    """No rank said why: it was killed, or hangs."""
    if verdict.is_memory or not verdict.may_pass or verdict.rank is not None or found.stuck_s is not None:
        return str(verdict)
    phases = [_phase(path) for path in sorted(run_dir.ranks.glob("rank*.status.json"))]
    where = ", ".join(f"rank {rank} in {phase}" for rank, phase in enumerate(phases))
    return (
        f"the run was ended from outside (launcher's code {found.launcher_code}; {where}): a process was killed, by "
        "hand or for want of host memory"
    )


def _log(run_dir: RunDir, verdict: Verdict) -> Path:
    return run_dir.logs / "launcher.log" if verdict.rank is None else log_of(run_dir, verdict.rank)


def _never_started(run_dir: RunDir, launcher_code: int | None) -> TrainingFailed:
    log = run_dir.logs / "launcher.log"
    last = _last_lines(log) or "it wrote nothing"
    if launcher_code is None:
        return TrainingFailed(f"the launcher started no rank and was ended: {last} (log: {log})")
    return TrainingFailed(f"the launcher ended with code {launcher_code} before any rank started: {last} (log: {log})")


def _has_status(run_dir: RunDir) -> bool:
    return any(run_dir.ranks.glob("rank*.status.json"))


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
