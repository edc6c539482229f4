"""What a probe took beyond its prediction leads to a plan that takes less, or to a sentence."""

from __future__ import annotations

import pytest

from vramplan.errors import NoPlanError
from vramplan.facts.devices import resolve_node
from vramplan.facts.resolve import resolve_architecture
from vramplan.memory.estimate import estimate
from vramplan.search.plan import plan_id
from vramplan.search.planner import make_plan
from vramplan.search.recalibrate import Correction, Seen
from vramplan.spec.run import HardwareSpec, RunSpec
from vramplan.supervise.probing import next_plan

PEAK = "step2.micro1.backward"


@pytest.fixture(scope="module")
def planned():
    run = RunSpec(
        model="meta-llama/Llama-3.2-1B-Instruct",
        global_batch_size=64,
        seq_len=2048,
        hardware=HardwareSpec(gpu="h100-80gb", gpus_per_node=4, host_memory="512GiB"),
    )
    architecture = resolve_architecture(run)
    plan = make_plan(run, resolve_node(run.hardware), architecture)
    return plan, architecture, estimate(plan.run, plan.node, architecture)


def beyond(num_bytes: int) -> Correction:
    return Correction.of([Seen(PEAK, num_bytes, 0)])


def test_the_next_plan_fits_with_what_was_seen_and_trains_the_same(planned):
    plan, architecture, known = planned
    correction = beyond(known.capacity_bytes - known.used_peak_bytes + 2**30)
    assert not correction.fits(known)
    found = next_plan(plan, architecture, correction)
    assert plan_id(found.run) != plan_id(plan.run)
    assert correction.fits(estimate(found.run, found.node, architecture))
    assert found.run.global_batch_size == plan.run.global_batch_size
    assert found.run.seq_len == plan.run.seq_len
    assert found.prediction.step_time_s >= plan.prediction.step_time_s


def test_where_no_plan_fits_it_is_said_what_to_change(planned):
    plan, architecture, known = planned
    with pytest.raises(NoPlanError, match="no other plan that keeps the training as it is takes less: lower seq_len"):
        next_plan(plan, architecture, beyond(known.capacity_bytes))
