"""The order of samples depends on seed and step, and on nothing else."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vramplan.data.sampler import (
    epoch_of,
    global_batch,
    micro_batches,
    permutation,
    rank_slice,
    steps_of_epochs,
)
from vramplan.errors import SpecError

sizes = st.integers(1, 50)


@given(seed=st.integers(0, 2**31), num_samples=sizes, batch_size=sizes, epochs=st.integers(1, 3))
def test_every_epoch_sees_every_sample_once(seed, num_samples, batch_size, epochs):
    steps = steps_of_epochs(epochs, num_samples, batch_size)
    seen = [index for step in range(steps) for index in global_batch(seed, step, num_samples, batch_size)]
    assert Counter(seen[: epochs * num_samples]) == dict.fromkeys(range(num_samples), epochs)
    assert len(seen) - epochs * num_samples < batch_size


@given(
    seed=st.integers(0, 100),
    step=st.integers(0, 20),
    dp_degree=st.integers(1, 4),
    share=st.integers(1, 6),
    micro=st.integers(1, 7),
    num_samples=sizes,
)
def test_ranks_and_micro_batches_only_cut_the_batch(seed, step, dp_degree, share, micro, num_samples):
    batch = global_batch(seed, step, num_samples, share * dp_degree)
    cut = [list(micro_batches(rank_slice(batch, rank, dp_degree), micro)) for rank in range(dp_degree)]
    assert [index for rank in cut for chunk in rank for index in chunk] == list(batch)
    assert len({tuple(len(chunk) for chunk in rank) for rank in cut}) == 1  # every rank makes the same forwards
    assert all(len(chunk) <= micro for rank in cut for chunk in rank)


def test_steps_can_be_asked_in_any_order():
    forwards = [global_batch(5, step, 13, 4) for step in range(10)]
    assert [global_batch(5, step, 13, 4) for step in reversed(range(10))] == forwards[::-1]


def test_epochs_and_seeds_differ():
    assert list(permutation(0, 0, 30)) != list(permutation(0, 1, 30))
    assert list(permutation(0, 0, 30)) != list(permutation(1, 0, 30))


def test_the_order_is_frozen():
    """A resumed run on another version of numpy must see the same samples."""
    assert permutation(0, 0, 8).tolist() == FROZEN


def test_epoch_of_a_step():
    assert [epoch_of(step, 10, 4) for step in range(6)] == [0, 0, 0, 1, 1, 2]


def test_a_batch_that_ranks_cannot_share_says_what_to_change():
    with pytest.raises(
        SpecError, match="global_batch_size 6 cannot be shared equally by 4 ranks: make it a multiple of 4"
    ):
        rank_slice(range(6), 0, 4)


def test_part_of_an_epoch():
    assert steps_of_epochs(0.5, 100, 10) == 5
    assert steps_of_epochs(0.01, 100, 10) == 1


FROZEN = [6, 3, 5, 0, 7, 2, 1, 4]
