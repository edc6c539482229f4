"""Hard rows come more often, easy ones still come, hopeless ones are capped, and a resumed run draws the same."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vramplan.data.hard import LossHistory, Mining, chances, draw
from vramplan.data.mixture import Stream, make_parts
from vramplan.errors import CheckpointError
from vramplan.spec.data import HardExamplesSpec

SPEC = HardExamplesSpec(temperature=0.5, floor=0.2, patience=2, min_improvement=0.1, cap=1.0)
visits = st.lists(st.tuples(st.integers(0, 9), st.floats(0, 20, width=32)), max_size=60)


def chances_of(seen, spec=SPEC, size=10):
    ids = np.array([index for index, _ in seen], dtype=np.int64)
    return chances(ids, np.array([loss for _, loss in seen], dtype=np.float32), size, spec)


@given(visits, st.floats(0.05, 5), st.floats(0, 1), st.floats(0, 3))
def test_chances_add_up_and_keep_floor_and_cap(seen, temperature, floor, cap):
    spec = HardExamplesSpec(temperature=temperature, floor=floor, patience=2, min_improvement=0.1, cap=cap)
    chance = chances_of(seen, spec)
    assert chance.sum() == pytest.approx(1)
    by_row = {index: [np.float32(loss) for other, loss in seen if other == index] for index in range(10)}
    stuck = {i for i, losses in by_row.items() if len(losses) >= 2 and min(losses) > (1 - 0.1) * losses[0]}
    if len(stuck) == 10:
        return
    for index in range(10):
        if index in stuck:
            assert chance[index] <= cap / 10 + 1e-9
        else:
            assert chance[index] >= floor / 10 - 1e-9


def test_the_harder_the_likelier_and_the_noisy_are_capped():
    rows = [(index, loss) for loss in (4.0, 2.0) for index in range(8)]  # all improve
    rows += [(8, 9.0), (8, 9.0), (9, 5.0), (9, 3.5)]  # 8 never does; 9 is hard and does
    chance = chances_of(rows)
    assert chance[9] == max(chance)
    assert chance[8] == pytest.approx(0.1)
    assert chance[9] > 2 * chance[0]
    colder = chances_of(rows, SPEC.model_copy(update={"temperature": 0.2}))
    assert colder[9] > chance[9]
    uncapped = chances_of(rows, SPEC.model_copy(update={"cap": 10.0}))
    assert uncapped[8] == max(uncapped)


@given(st.lists(st.floats(0.001, 1), min_size=1, max_size=50), st.integers(0, 5))
def test_a_draw_has_every_sample_as_often_as_its_chance_says(weights, seed):
    chance = np.array(weights) / np.sum(weights)
    drawn = draw(chance, [seed])
    assert len(drawn) == len(chance)
    counts = np.bincount(drawn, minlength=len(chance))
    assert (np.abs(counts - len(chance) * chance) < 1 + 1e-9).all()
    assert np.array_equal(drawn, draw(chance, [seed]))


def make_stream():
    return Stream(make_parts(["a"], [12], None, ("general", 5, 0.25)), 0, Mining(SPEC, 0))


def loss_of(index, step):
    return 5.0 if index < 3 else 1.0 / (1 + step)


def run_steps(stream, first, last, batch_size=8):
    seen = []
    for step in range(first, last):
        ids = stream.batch(step, batch_size)
        stream.mining.history.add(ids, [loss_of(index, step) for index in ids])
        seen.append(ids)
    return seen


def test_the_first_epoch_sees_all_and_later_ones_the_hard(tmp_path):
    spec = SPEC.model_copy(update={"cap": 5.0})
    stream = Stream(make_parts(["a"], [12], None, ("general", 5, 0.25)), 0, Mining(spec, 0))
    seen = run_steps(stream, 0, 20)  # six of the source and two of replay a step: an epoch has two steps
    first = Counter(index for ids in seen[:2] for index in ids if index < 12)
    assert set(first.values()) == {1}
    later = Counter(index for ids in seen[2:] for index in ids if index < 12)
    assert min(later[index] for index in range(3)) > 2 * max(later[index] for index in range(3, 12))
    assert all(sum(index >= 12 for index in ids) == 2 for ids in seen)
    replayed = Counter(index for ids in seen for index in ids if index >= 12)
    assert max(replayed.values()) - min(replayed.values()) <= 1


@pytest.mark.parametrize("stop", [1, 2, 3, 7, 12])
def test_a_resumed_run_draws_what_the_other_drew(tmp_path, stop):
    path = tmp_path / "losses.bin"
    whole = make_stream()
    whole.mining.history.write_to(path)
    expected = run_steps(whole, 0, 16)
    resumed = make_stream()
    resumed.mining.history = LossHistory.read(path, stop, 8)
    resumed.mining.history.write_to(path)
    assert run_steps(resumed, stop, 16) == expected[stop:]
    assert len(LossHistory.read(path, 16, 8)) == 16
    assert path.stat().st_size == 16 * 8 * 12


def test_losses_that_are_missing_are_said(tmp_path):
    with pytest.raises(CheckpointError, match=r"holds the losses of 0 steps, but the checkpoint is of step 3"):
        LossHistory.read(tmp_path / "none.bin", 3, 8)
    assert len(LossHistory.read(tmp_path / "none.bin", 0, 8)) == 0
