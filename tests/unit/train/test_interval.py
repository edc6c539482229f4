"""Checkpoints are as far apart as failures allow."""

from __future__ import annotations

import random

import pytest

from vramplan.train.interval import LOST_FRAC, save_every, save_interval_s

DAY_S = 86_400.0


def lost_frac(interval_s: float, save_s: float, failure_s: float, seed: int = 0) -> tuple[float, float]:
    """(work undone by failures, time spent saving) as shares of a long run, played with random failures."""
    dice, undone, saving, clock, since_save = random.Random(seed), 0.0, 0.0, 0.0, 0.0
    next_failure = dice.expovariate(1 / failure_s)
    while clock < 3_000 * failure_s:
        until_save = interval_s - since_save
        if clock + until_save < next_failure:
            clock += until_save + save_s
            saving, since_save = saving + save_s, 0.0
        else:
            undone += max(0.0, since_save + next_failure - clock)
            clock, since_save = max(clock, next_failure), 0.0
            next_failure = clock + dice.expovariate(1 / failure_s)
    return undone / clock, saving / clock


@pytest.mark.parametrize("save_s", [0.5, 5.0, 20.0])
def test_young_s_interval_is_the_cheapest(save_s):
    best = save_interval_s(save_s, DAY_S)
    cost = {factor: sum(lost_frac(best * factor, save_s, DAY_S)) for factor in (0.4, 1.0, 2.5)}
    assert cost[1.0] < cost[0.4]
    assert cost[1.0] < cost[2.5]


@pytest.mark.parametrize("save_s", [0.5, 60.0, 600.0])
def test_less_than_a_hundredth_of_the_time_is_undone(save_s):
    undone, _ = lost_frac(save_interval_s(save_s, DAY_S), save_s, DAY_S)
    assert undone < LOST_FRAC * 1.1  # the play is random; 3,000 failures leave about 2% of spread


def test_in_steps():
    assert save_every(step_s=2.0, save_s=5.0, failure_s=DAY_S) == int((2 * 5 * DAY_S) ** 0.5 / 2)
    assert save_every(step_s=2.0, save_s=1e6, failure_s=DAY_S) == int(0.02 * DAY_S / 2)
    assert save_every(step_s=1e6, save_s=5.0, failure_s=DAY_S) == 1
