"""Looks at the ranks of a run while it goes: which has said why it ends, which is gone, which hangs."""

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
STUCK_AFTER_S = 1800.0
"""How long a micro-batch or an optimizer step may take: as long as NCCL waits for a peer by default."""
_LONGEST_LOOK_S = 1.0


@dataclass(frozen=True, slots=True)
class Trouble:
    """What a look found; empty tuples where there is none of its kind."""

    markers: tuple[Path, ...] = ()
    dead: tuple[int, ...] = ()
    silent: tuple[int, ...] = ()
    stuck_s: float | None = None
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
    """A rank's last heartbeat and phase, and for how long each has been the same, by the watcher's own clock: looks
    that come late (a machine that slept) do not make a rank silent."""

    beat: float = 0.0
    since: float = 0.0
    silent_s: float = 0.0
    same_phase_s: float = 0.0


@dataclass
class RankWatch:
    """Reads the ranks' files. A missing process is seen of ranks on this node; those of others fall silent."""

    run_dir: RunDir
    silent_after_s: float = SILENT_AFTER_S
    stuck_after_s: float = STUCK_AFTER_S
    kills: KillCounter | None = None
    """Is told which processes are the ranks'."""
    _node: str = field(default_factory=node_identity)
    _seen: dict[int, _Seen] = field(default_factory=dict)
    _last_look: float | None = None
    _all_gone_s: float = 0.0

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
        self._all_gone_s = 0.0 if running or lives or not every else self._all_gone_s + passed
        silent = (rank for rank, seen in self._seen.items() if seen.silent_s > self.silent_after_s)
        return Trouble(
            markers=tuple(sorted(self.run_dir.ranks.glob("rank*.failure.json"))),
            dead=tuple(sorted(gone - ended)),
            # one that has come to its end beats no more when it is gone, which is no trouble
            silent=tuple(rank for rank in silent if rank not in ended or rank in lives),
            stuck_s=self._stuck_s(running),
            launcher_hangs=self._all_gone_s > self.silent_after_s,
        )

    def _notice(self, status: dict[str, Any], passed: float) -> None:
        seen = self._seen.setdefault(status["rank"], _Seen())
        seen.silent_s = 0.0 if status["time"] != seen.beat else seen.silent_s + passed
        seen.same_phase_s = 0.0 if status.get("since") != seen.since else seen.same_phase_s + passed
        seen.beat, seen.since = status["time"], status.get("since", 0.0)

    def _stuck_s(self, running: list[dict[str, Any]]) -> float | None:
        """For how long no rank went on in a step, if for too long. Other phases may take as long as they take."""
        if not running or not all(status["phase"].startswith("step") for status in running):
            return None
        shortest = min(self._seen[status["rank"]].same_phase_s for status in running)
        return shortest if shortest > self.stuck_after_s else None


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
