"""Shares are exact at every step, whatever the ranks and micro-batches, and every sample of a source has its turn."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st

from vramplan.data.mixture import Stream, counts_of_first, exact_shares, make_parts
from vramplan.data.sampler import epoch_of, global_batch, micro_batches, rank_slice, steps_of_epochs

weights = st.lists(st.integers(1, 50), min_size=1, max_size=5)


def stream_of(sizes, given_weights, replay=None, seed=0):
    names = [str(number) for number in range(len(sizes))]
    return Stream(make_parts(names, sizes, given_weights, replay), seed)


@given(weights, st.integers(0, 10_000), st.integers(0, 500))
def test_counts_add_up_and_never_fall(given_weights, first, more):
    shares = exact_shares(given_weights)
    before, after = counts_of_first(first, shares), counts_of_first(first + more, shares)
    assert sum(before) == first
    assert all(later >= earlier for later, earlier in zip(after, before, strict=True))
    for count, share in zip(before, shares, strict=True):
        assert abs(count - first * share) < len(shares)


@given(
    st.integers(0, 300),
    st.integers(1, 24),
    st.integers(1, 99),
    st.lists(st.integers(1, 30), min_size=1, max_size=4),
    st.integers(1, 40),
)
def test_replay_is_never_a_whole_sequence_off(step, batch_size, percent, sizes, replay_size):
    stream = stream_of(sizes, None, ("general", replay_size, percent / 100))
    share = Fraction(percent, 100)
    start = stream.parts[-1].first
    in_batch = sum(index >= start for index in stream.batch(step, batch_size))
    assert abs(in_batch - share * batch_size) < 1
    if (share * batch_size).denominator == 1:
        assert in_batch == share * batch_size
    so_far = counts_of_first((step + 1) * batch_size, [share, 1 - share])[0]
    assert 0 <= share * (step + 1) * batch_size - so_far < 1


def test_a_tenth_of_ten_is_one_in_every_batch():
    stream = stream_of([100], None, ("general", 7, 0.1))
    counts = {sum(index >= 100 for index in stream.batch(step, 10)) for step in range(50)}
    assert counts == {1}


@given(st.integers(0, 9), st.integers(0, 60), st.integers(1, 9), st.integers(1, 40))
def test_one_source_is_sampled_as_ever(seed, step, batch_size, size):
    stream = stream_of([size], None, seed=seed)
    assert stream.batch(step, batch_size) == global_batch(seed, step, size, batch_size)
    assert stream.epoch_of(step, batch_size) == epoch_of(step, size, batch_size)
    assert stream.steps_of_epochs(1.5, batch_size) == steps_of_epochs(1.5, size, batch_size)


def test_every_sample_of_a_source_has_its_turn_before_any_comes_again():
    stream = stream_of([6, 4], [1, 3], ("general", 5, 0.25))
    seen = Counter(index for step in range(30) for index in stream.batch(step, 8))
    for part in stream.parts:
        own = [seen[index] for index in range(part.first, part.first + part.size)]
        assert max(own) - min(own) <= 1
        assert abs(sum(own) - 240 * part.share) < 3


@given(st.integers(0, 50), st.sampled_from([1, 2, 4]), st.integers(1, 3), st.integers(1, 5))
def test_ranks_and_micro_batches_only_cut_the_batch(step, ranks, share, micro):
    stream = stream_of([9, 13], [2, 1], ("general", 11, 0.3))
    batch = stream.batch(step, 12)
    cut = [list(micro_batches(rank_slice(batch, rank, ranks), micro)) for rank in range(ranks)]
    assert [index for rank in cut for chunk in rank for index in chunk] == list(batch)


def test_steps_can_be_asked_in_any_order():
    stream = stream_of([9, 13], None, ("general", 11, 0.3))
    forwards = [stream.batch(step, 6) for step in range(20)]
    assert [stream.batch(step, 6) for step in reversed(range(20))] == forwards[::-1]


def test_epochs_are_of_the_sources_and_not_of_replay():
    stream = stream_of([80], None, ("general", 1000, 0.2))
    assert stream.steps_of_epochs(1, 10) == 10
    assert [stream.epoch_of(step, 10) for step in (9, 10, 20)] == [0, 1, 2]


def test_shares_by_size_and_by_weight():
    assert [part.share for part in stream_of([30, 10], None).parts] == [Fraction(3, 4), Fraction(1, 4)]
    by_weight = stream_of([30, 10], [0.1, 0.3], ("g", 5, 0.2)).parts
    assert [part.share for part in by_weight] == [Fraction(1, 5), Fraction(3, 5), Fraction(1, 5)]
    assert [part.first for part in by_weight] == [0, 30, 40]
