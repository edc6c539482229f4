"""What the trainer can convert is what the spec says can be cut anew."""

from __future__ import annotations

from typing import get_args

import pytest

from vramplan.spec.run import Optimizer, OptimizerSpec
from vramplan.train.fragments import moments_of


@pytest.mark.parametrize("kind", get_args(Optimizer))
def test_spec_and_trainer_agree_on_what_can_be_cut_anew(kind):
    optimizer = OptimizerSpec(kind=kind)
    assert (moments_of(optimizer) is not None) == optimizer.state_can_be_cut_anew
    assert optimizer.is_elementwise or not optimizer.state_can_be_cut_anew


def test_momentum_is_a_state_of_its_own():
    assert moments_of(OptimizerSpec(kind="sgd", momentum=0.9)) == ("momentum_buffer",)
    assert moments_of(OptimizerSpec(kind="sgd")) == ()
