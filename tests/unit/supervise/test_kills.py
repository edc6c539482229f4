"""Which kills of the kernel are held against a rank's end."""

from __future__ import annotations

from pathlib import Path

import pytest

from vramplan.supervise.kills import KillCounter

OWN, RANKS, MACHINE = Path("own"), Path("ranks"), Path("vmstat")


@pytest.fixture
def kernel() -> dict[str, dict[Path, int]]:
    """What each process's files count."""
    return {"self": {OWN: 5, MACHINE: 9}}


def test_what_was_counted_before_the_run_is_not_its_own(kernel):
    counter = KillCounter(lambda process: kernel.get(process, {}))
    assert counter.risen() == 0
    kernel["self"] = {OWN: 6, MACHINE: 10}
    assert counter.risen() == 2


def test_a_rank_s_own_group_counts_from_when_it_is_seen_also_when_the_rank_is_gone(kernel):
    counter = KillCounter(lambda process: kernel.get(process, {}))
    kernel["77"] = {RANKS: 3}
    counter.look([77])
    kernel["77"] = {RANKS: 4}
    counter.look([77])
    assert counter.risen() == 1
    del kernel["77"]
    assert counter.risen() == 1


def test_a_kill_of_long_ago_is_another_s(kernel):
    counter = KillCounter(lambda process: kernel.get(process, {}), recent_s=0.0)
    kernel["self"] = {OWN: 6, MACHINE: 10}
    counter.look([1])  # a rank that is new: counted at once
    assert counter.risen() == 0
