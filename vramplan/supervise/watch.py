"""Looks at the ranks of a run while it goes: which has said why it ends, which is gone, which hangs.

Two things are a hang: a rank that gives no heartbeat (it is stopped, or its machine is), and ranks that all live and do
not go on, whatever they are at: one stands still, and the others wait for it.
"""

from __future__ import annotations

import json
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vramplan.facts.host import node_identity
from vramplan.measure.run_dir import RunDir
from vramplan.supervise.classify import RankState
from vramplan.supervise.kills import KillCounter

SILENT_AFTER_S = 60.0
"""A rank beats each second; one that has not for so long is stopped, or its machine is."""
STUCK_AFTER_S = 600.0
"""How long no rank may go on: as long as torch lets NCCL wait for a peer (torch/distributed/constants.py,
``default_pg_nccl_timeout``). Going on is a batch, a parameter, a file or 64 KiB of bytes or pages in a second."""
_LONGEST_LOOK_S = 1.0


@dataclass(frozen=True, slots=True)
class Patience:
    """After how many seconds ranks are taken to hang."""

    silent_after_s: float = SILENT_AFTER_S
    """Without a heartbeat."""
    stuck_after_s: float = STUCK_AFTER_S
    """With heartbeats, and without any rank going on."""


PATIENCE = Patience()
"""Unless told."""


@dataclass(frozen=True, slots=True)
class Trouble:
    """What a look found; empty tuples where there is none of its kind."""

    markers: tuple[Path, ...] = ()
    dead: tuple[int, ...] = ()
    silent: tuple[int, ...] = ()
    stuck_s: float | None = None
    """For how long no rank went on, where that was too long."""
    stuck_rank: int | None = None
    """The one that stood still first: others came as far as they could without it."""
    launcher_hangs: bool = False
    """Whether every rank has long come to its end and is gone, and the launcher lives on."""

    @property
    def is_of_end(self) -> bool:
        """Whether a rank has ended, upon which the launcher ends the others."""
        return bool(self.markers or self.dead)

    def __bool__(self) -> bool:
        return bool(self.markers or self.dead or self.silent or self.stuck_s is not None or self.launcher_hangs)


@dataclass
class _Seen:
    """A rank's last heartbeat and progress, and for how long each has been the same, by the watcher's own clock:
    looks that come late (a machine that slept) do not make a rank silent."""

    beat: float = 0.0
    progress: int = 0
    silent_s: float = 0.0
    still_s: float = 0.0


@dataclass
class RankWatch:
    """Reads the ranks' files. A missing process is seen of ranks on this node; those of others fall silent."""

    run_dir: RunDir
    silent_after_s: float = SILENT_AFTER_S
    stuck_after_s: float = STUCK_AFTER_S
    start_within_s: float = STUCK_AFTER_S
    """How long a launcher may take until its first rank runs, at the least: it reads the whole training stack first."""
    kills: KillCounter | None = None
    """Is told which processes are the ranks'."""
    _node: str = field(default_factory=node_identity)
    _seen: dict[int, _Seen] = field(default_factory=dict)
    _last_look: float | None = None
    _all_gone_s: float = 0.0
    _none_yet_s: float = 0.0

    def look(self) -> Trouble:
        """What is wrong now."""
        now = time.monotonic()
        passed = 0.0 if self._last_look is None else min(now - self._last_look, _LONGEST_LOOK_S)
        self._last_look = now
        every = read_statuses(self.run_dir)
        for status in every:
            self._notice(status, passed)
        ended = {status["rank"] for status in every if status["phase"] == "end"}
        running = [status for status in every if status["rank"] not in ended]
        here = [status for status in every if status.get("node") == self._node]
        if self.kills is not None:
            self.kills.look(status["pid"] for status in here)
        gone = {status["rank"] for status in here if not _lives(status["pid"])}
        lives = {status["rank"] for status in here} - gone
        self._none_yet_s = 0.0 if every else self._none_yet_s + passed
        self._all_gone_s = 0.0 if running or lives or not every else self._all_gone_s + passed
        silent = (rank for rank, seen in self._seen.items() if seen.silent_s > self.silent_after_s)
        # ranks that say that they are at their end wait for each other once more
        stuck_s, stuck_rank = self._stuck([status["rank"] for status in running] or sorted(lives))
        return Trouble(
            markers=tuple(sorted(self.run_dir.ranks.glob("rank*.failure.json"))),
            dead=tuple(sorted(gone - ended)),
            # one that has come to its end beats no more when it is gone, which is no trouble
            silent=tuple(rank for rank in silent if rank not in ended or rank in lives),
            stuck_s=stuck_s,
            stuck_rank=stuck_rank,
            launcher_hangs=self._all_gone_s > self.silent_after_s,
        )

    def _notice(self, status: dict[str, Any], passed: float) -> None:
        seen = self._seen.setdefault(status["rank"], _Seen())
        seen.silent_s = 0.0 if status["time"] != seen.beat else seen.silent_s + passed
        progress = status.get("progress", 0)
        seen.still_s = 0.0 if progress != seen.progress else seen.still_s + passed
        seen.beat, seen.progress = status["time"], progress

    def _stuck(self, ranks: list[int]) -> tuple[float | None, int | None]:
        """For how long none of ``ranks`` went on, if for too long, and which stood still first. One that goes on is
        enough: others may wait for it. Without any, for how long the launcher, which tells nothing, started none."""
        shortest = min((self._seen[rank].still_s for rank in ranks), default=self._none_yet_s)
        patience = self.stuck_after_s if ranks else max(self.stuck_after_s, self.start_within_s)
        if shortest <= patience:
            return None, None
        return shortest, max(ranks, key=lambda rank: self._seen[rank].still_s, default=None)


def read_statuses(run_dir: RunDir) -> list[dict[str, Any]]:
    """What each rank's status file says, by rank; those that are not whole yet are left out."""
    found = []
    for path in run_dir.ranks.glob("rank*.status.json"):
        with suppress(OSError, ValueError):
            status = json.loads(path.read_text(encoding="utf-8"))
            if {"rank", "pid", "phase", "time"} <= status.keys():
                found.append(status)
    return sorted(found, key=lambda status: int(status["rank"]))


def rank_states(run_dir: RunDir) -> tuple[RankState, ...]:
    """Where each rank was last."""
    return tuple(
        RankState(status["rank"], status["phase"], status.get("step", 0), status.get("micro", 0))
        for status in read_statuses(run_dir)
    )


def _lives(pid: int) -> bool:
    """Whether a process is there and no zombie (its parent may not have asked for it yet)."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except OSError:
        return False
    return text.rpartition(")")[2].split()[0] not in ("Z", "X")
