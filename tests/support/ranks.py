"""Workers of ``tests/support`` as ranks of one job, in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from vramplan.supervise.child import free_port

from support.training import ROOT

WORKER_TIMEOUT_S = 600


def run_workers(module: str, world_size: int, *arguments: str | Path) -> None:
    """``python -m support.MODULE ARGUMENTS`` on as many ranks, to its end, which has to be a good one."""
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", f"support.{module}", *map(str, arguments)],
            cwd=ROOT / "tests",
            env=os.environ | _environment(rank, world_size, port),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for port in [free_port()]
        for rank in range(world_size)
    ]
    try:
        outputs = [rank.communicate(timeout=WORKER_TIMEOUT_S)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert all(rank.returncode == 0 for rank in ranks), "\n".join(outputs)


def _environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_SIZE": world_size}
    numbers |= {"LOCAL_WORLD_SIZE": world_size, "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    return {"MASTER_ADDR": "127.0.0.1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)} | {
        name: str(number) for name, number in numbers.items()
    }
