"""Ends the ranks that a launcher started on other nodes: they share the run's directory with us, and nothing else.

DeepSpeed's launcher reaches other nodes by ssh, and what it started there outlives the connection.
"""

from __future__ import annotations

import time

from vramplan.facts.host import node_identity
from vramplan.measure.run_dir import RunDir
from vramplan.supervise.watch import read_statuses

QUIET_S = 10.0
"""A rank beats each second, and a shared folder may show it some seconds late (NFS: 3 unless told, nfs(5) acregmin)."""
PATIENCE_S = 60.0
_POLL_S = 0.2


def end_other_nodes(run_dir: RunDir, port: int, quiet_s: float = QUIET_S, patience_s: float = PATIENCE_S) -> bool:
    """Asks every rank that met at ``port`` to end; returns when those of other nodes beat no more, or after
    ``patience_s``; whether they do not."""
    run_dir.ranks.mkdir(parents=True, exist_ok=True)
    run_dir.stop_of(port).touch()
    beats, since, deadline = _beats(run_dir), time.monotonic(), time.monotonic() + patience_s
    while beats and time.monotonic() - since < quiet_s:
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_S)
        now = _beats(run_dir)
        if now != beats:
            beats, since = now, time.monotonic()
    return True


def _beats(run_dir: RunDir) -> dict[int, float]:
    """The last heartbeat of each rank elsewhere that has not come to its end."""
    here = node_identity()
    return {
        status["rank"]: status["time"]
        for status in read_statuses(run_dir)
        if status.get("node") != here and status["phase"] != "end"
    }
