"""A deep model's trace follows from few layers: block by block the same as traced in full."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vramplan.simulate.events import Events
from vramplan.simulate.repeats import Law, inserted_stretches, law_of

from support import depth_cases


def check(ranks, cases):
    done = subprocess.run(
        [sys.executable, depth_cases.__file__, str(ranks), *cases],
        capture_output=True,
        text=True,
        timeout=1200,
        env={
            **os.environ,
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]),
        },
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"case"')]
    assert [one["case"] for one in found] == list(cases)
    assert [one["differing"] for one in found] == [[]] * len(cases), found
    assert all(one["num_blocks"] > 500 for one in found), found


@pytest.mark.parametrize("ranks", depth_cases.CASES)
def test_followed_is_traced_in_full(ranks):
    check(ranks, depth_cases.CASES[ranks])


@pytest.mark.slow
@pytest.mark.parametrize("ranks", depth_cases.MORE_CASES)
def test_followed_is_traced_in_full_also_here(ranks):
    check(ranks, depth_cases.MORE_CASES[ranks])


KINDS = st.integers(0, 6)
STRETCHES = st.lists(st.lists(KINDS, min_size=1, max_size=5), min_size=1, max_size=3)


def sequence(pieces, repeats, times):
    """``pieces`` with a repeated stretch after each: kinds beyond 10 are told apart, so that nothing repeats by chance;
    the number of each event counts up where it repeats."""
    found, place = [], 100
    for piece, repeat in zip(pieces, repeats, strict=True):
        found += [(place + index, (kind + times,)) for index, kind in enumerate(piece)]
        place += 20
        found += [(place + index, (kind * turn,)) for turn in range(2 + times) for index, kind in enumerate(repeat)]
        place += 20
    return Events.of([*found, (7, (0,))])


@settings(max_examples=200, deadline=None)
@given(STRETCHES, st.data())
def test_what_repeats_is_repeated(repeats, data):
    pieces = data.draw(st.lists(st.lists(KINDS, min_size=1, max_size=4), min_size=len(repeats), max_size=len(repeats)))
    law = law_of(*(sequence(pieces, repeats, times) for times in range(3)))
    assert law is not None
    for times in (0, 1, 5, 20):
        assert law.after(times).equals(sequence(pieces, repeats, times))


@given(STRETCHES, st.integers(0, 2), st.integers(0, 200))
@settings(max_examples=100, deadline=None)
def test_one_number_that_does_not_follow_is_no_law(repeats, which, where):
    pieces = [[1]] * len(repeats)
    three = [sequence(pieces, repeats, times) for times in range(3)]
    spoilt = three[which]
    values = spoilt.values.copy()
    values[where % len(values)] += 1_000
    three[which] = Events(spoilt.kinds, spoilt.offsets, values)
    assert law_of(*three) is None


def test_a_model_that_grows_otherwise_has_no_stretches():
    first = Events.of([(1, ()), (2, ()), (3, ())])
    assert inserted_stretches(first, Events.of([(1, ()), (9, ()), (2, ()), (3, ())])) is None
    assert inserted_stretches(first, first) == ()
    assert Law(first, first, ()).after(3).equals(first)
    assert np.array_equal(first.kinds, [1, 2, 3])
