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
held, attempts = 0, 20_000 if sys.argv[1] == "settled" else 200_000
for attempt in range(attempts):
    tensor = torch.zeros(4)
    if attempt % 2:
        dist.all_reduce(tensor)
    else:
        work = dist.all_reduce(tensor, async_op=True)
        work.wait()
        assert work.is_completed()
        del work
    held += tensor._use_count() > 1
    if held:  # each is a race of torch's own between threads: no more of them than the one that is looked for
        break
collectives.remove()
assert dist.all_reduce is original
print(held)
dist.destroy_process_group()
"""


def held_after(how: str) -> int:
    found = subprocess.run([sys.executable, "-c", COUNT_HELD, how], capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr
    return int(found.stdout)


def test_gloo_lets_go_late_and_is_waited_for():
    assert held_after("as it is") > 0
    assert held_after("settled") == 0
