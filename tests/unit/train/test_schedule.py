from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vramplan.spec.training import TrainingSpec
from vramplan.train.schedule import learning_rate

schedules = st.sampled_from(["cosine", "linear", "constant"])


@given(
    schedule=schedules,
    total=st.integers(1, 200),
    warmup=st.floats(0, 1),
    floor=st.floats(0, 1),
    peak=st.floats(1e-6, 1),
)
def test_rates_rise_to_the_peak_then_never_rise_and_stay_above_the_floor(schedule, total, warmup, floor, peak):
    training = TrainingSpec(schedule=schedule, warmup_frac=warmup, min_lr_frac=floor)
    rates = [learning_rate(step, total, peak, training) for step in range(total)]
    assert all(0 < rate <= peak * (1 + 1e-9) for rate in rates) or floor == 0
    top = rates.index(max(rates))
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert all(later <= earlier * (1 + 1e-9) for earlier, later in zip(rates[top:], rates[top + 1 :], strict=False))
    assert min(rates[top:]) >= peak * floor * (1 - 1e-9)
    assert max(rates) == pytest.approx(peak)


def test_cosine_at_known_points():
    training = TrainingSpec(warmup_frac=0.2, min_lr_frac=0.1)
    rates = [learning_rate(step, 10, 1.0, training) for step in range(10)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[6] == pytest.approx(0.1 + 0.9 * 0.5)  # half way down
    assert learning_rate(10, 10, 1.0, training) == pytest.approx(0.1)


def test_linear_and_constant():
    training = TrainingSpec(warmup_frac=0, schedule="linear")
    assert [learning_rate(step, 4, 1.0, training) for step in range(4)] == [1.0, 0.75, 0.5, 0.25]
    training = TrainingSpec(warmup_frac=0, schedule="constant")
    assert {learning_rate(step, 4, 0.5, training) for step in range(4)} == {0.5}
