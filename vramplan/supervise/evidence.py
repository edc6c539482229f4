"""Collects what is left of a run that ended: markers, last phases, output, the kernel's counters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from vramplan.measure.marker import Marker
from vramplan.measure.run_dir import RunDir
from vramplan.supervise.classify import Evidence
from vramplan.supervise.watch import Trouble, rank_states

_TAIL_BYTES = 4096


def collect(run_dir: RunDir, launcher_code: int | None, trouble: Trouble, oom_kills: int = 0) -> Evidence:
    """Everything that ``classify`` reads, once the run's processes are gone. ``oom_kills``: as in ``Evidence``."""
    ranks = rank_states(run_dir)
    return Evidence(
        launcher_code=launcher_code,
        markers=tuple(read_markers(run_dir)),
        ranks=ranks,
        dead=trouble.dead,
        silent=trouble.silent,
        stuck_s=trouble.stuck_s,
        stuck_rank=trouble.stuck_rank,
        tails={state.rank: _tail(log_of(run_dir, state.rank)) for state in ranks},
        oom_kills=oom_kills,
    )


def read_markers(run_dir: RunDir) -> Iterator[Marker]:
    """The markers that are whole. A full disk or a cut copy leaves half a file: what other ranks said still counts."""
    for path in sorted(run_dir.ranks.glob("rank*.failure.json")):
        with suppress(OSError, ValueError, KeyError, TypeError):
            yield Marker.read(path)


def log_of(run_dir: RunDir, rank: int) -> Path:
    """The newest output of a rank; the launcher's where the rank has none."""
    of_rank = sorted(run_dir.logs.glob(f"*_rank{rank}.log"))
    return of_rank[-1] if of_rank else run_dir.logs / "launcher.log"


def _tail(path: Path) -> str:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            return file.read().decode("utf-8", errors="replace")
    except OSError:
        return ""
