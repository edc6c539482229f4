"""What the simulation takes a block for, by who made it and when, is what the ledger's label says of the same bytes."""

from __future__ import annotations

import pytest

from vramplan.simulate.request import Simulator
from vramplan.simulate.result import CATEGORY_ORDER

from support.matrix import Case, prepare

RUN = "llama.13x2/full/{}/none/sdpa/{}/none/cuda/4/1/2/adamw/none/default/let go"
RUNS = [RUN.format(*each) for each in [(0, "bf16"), (1, "bf16"), (2, "bf16"), (2, "fp32"), (3, "bf16")]]


@pytest.fixture(scope="module")
def simulated():
    with Simulator(1) as simulator:
        found = simulator.run(prepare(Case.parse(key)).request() for key in RUNS)
        return {request.key: result for request, result in found}


@pytest.mark.parametrize("key", RUNS)
def test_categories_at_the_peak_are_the_ledgers(key, simulated):
    found = simulated[key]
    assert found.error is None
    ours = dict.fromkeys(CATEGORY_ORDER, 0)
    for term in prepare(Case.parse(key)).estimate.peak.terms:
        ours[term.category.value] += term.num_bytes
    theirs = {name: found.categories.get(name, 0) for name in CATEGORY_ORDER}
    for each in (ours, theirs):  # an activation that its forward lets go of is temporary to the simulation
        each["activation"] += each.pop("temporary")
    apart = {name: (size, theirs[name]) for name, size in ours.items()}
    allowed = 0.01 * found.allocated_peak_bytes
    assert all(abs(one - other) <= allowed for one, other in apart.values()), apart
