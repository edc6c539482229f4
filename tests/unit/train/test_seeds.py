from __future__ import annotations

import itertools

import torch

from vramplan.train.seeds import seed_initial_weights, seed_micro_batch


def draw() -> float:
    return float(torch.rand(()))


def test_each_micro_batch_of_each_rank_and_step_draws_its_own_stream_again():
    places = list(itertools.product((0, 1), range(3), range(3), range(2)))

    def draws() -> list[float]:
        found = []
        for place in places:
            seed_micro_batch(*place)
            found.append(draw())
        return found

    first = draws()
    assert len(set(first)) == len(places)
    torch.manual_seed(99)
    assert draws() == first


def test_initial_weights_have_a_stream_of_their_own():
    seed_initial_weights(0)
    first = draw()
    seed_initial_weights(1)
    assert draw() != first
