"""Blocking collectives wait until their backend's thread has let go of their tensors: gloo's, in a process apart."""

from __future__ import annotations

import subprocess
import sys

COUNT_HELD = """
import sys, torch, torch.distributed as dist
from vramplan.measure.settled import SettledCollectives

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
collectives = SettledCollectives()
original = dist.all_reduce
if sys.argv[1] == "settled":
    collectives.install()
    collectives.install()  # what a probe that starts again does
    assert dist.all_reduce(torch.zeros(4), async_op=True) is not None
held = 0
for _ in range(20_000):
    tensor = torch.zeros(4)
    dist.all_reduce(tensor)
    held += tensor._use_count() > 1
collectives.remove()
assert dist.all_reduce is original
print(held)
"""


def held_after(how: str) -> int:
    found = subprocess.run(
        [sys.executable, "-c", COUNT_HELD, how], capture_output=True, text=True, timeout=120, check=True
    )
    return int(found.stdout)


def test_gloo_lets_go_late_and_is_waited_for():
    assert held_after("as it is") > 0
    assert held_after("settled") == 0
