from __future__ import annotations

import pytest

from vramplan.facts.device import Device, Node
from vramplan.search.plan import Plan, Prediction
from vramplan.spec.run import RunSpec


@pytest.fixture
def small_plan() -> Plan:
    """A plan whose predicted peak is 4 MiB."""
    peak = 4 * 2**20
    prediction = Prediction(1.0, 1.0, "m", "backward", peak, peak, 2 * peak, 0, None, (), ())
    return Plan(RunSpec(model="m"), Node(Device("cpu", "cpu", 1, 1), 2), prediction, 0.1)
