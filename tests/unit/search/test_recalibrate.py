"""What was seen raises predictions of its kind."""

from __future__ import annotations

import pytest

from vramplan.facts.devices import resolve_node
from vramplan.facts.resolve import resolve_architecture
from vramplan.measure.record import PhaseReading
from vramplan.memory.estimate import estimate
from vramplan.search.planner import make_plan
from vramplan.search.recalibrate import Correction, Seen, predicted_bytes
from vramplan.spec.run import HardwareSpec, RunSpec
from vramplan.supervise.probing import seen_in

GIB = 2**30


@pytest.fixture(scope="module")
def planned():
    run = RunSpec(
        model="meta-llama/Llama-3.2-1B-Instruct",
        global_batch_size=64,
        seq_len=2048,
        hardware=HardwareSpec(gpu="h100-80gb", gpus_per_node=4, host_memory="512GiB"),
    )
    plan = make_plan(run, resolve_node(run.hardware), resolve_architecture(run))
    return plan.run, estimate(plan.run, plan.node, resolve_architecture(plan.run))


def test_the_most_seen_beyond_counts_for_its_kind_alone(planned):
    _, known = planned
    correction = Correction.of(
        [
            Seen("step1.micro1.backward", 12 * GIB, 10 * GIB),
            Seen("step2.micro1.backward", 15 * GIB, 12 * GIB),
            Seen("step1.micro1.forward", 3 * GIB, 4 * GIB),
        ]
    )
    assert correction.beyond == {"backward": 3 * GIB}
    assert correction.most == 3 * GIB
    assert Correction().most == 0
    for phase, more in (("step9.micro2.backward", 3 * GIB), ("step9.micro2.forward", 0)):
        assert correction.bytes_of(known, phase, 9) == predicted_bytes(known, phase, 9) + more


def test_what_fits_is_what_fits_with_the_correction(planned):
    _, known = planned
    assert Correction().fits(known)
    room = known.capacity_bytes - known.used_peak_bytes
    kind = known.peak.phase.value
    peak = known.allocated_peak_bytes
    assert Correction.of([Seen(f"step2.micro1.{kind}", peak + room, peak)]).fits(known)
    assert not Correction.of([Seen(f"step2.micro1.{kind}", peak + room + 1, peak)]).fits(known)


def test_what_the_driver_counts_beyond_the_overhead_counts_as_needed(planned):
    _, known = planned
    beyond_tensors = known.used_peak_bytes - known.allocated_peak_bytes
    assert beyond_tensors > 0
    readings = (
        PhaseReading("step2.micro1.backward", 10 * GIB, GIB, used_peak_bytes=10 * GIB + beyond_tensors + 7),
        PhaseReading("step2.micro1.forward", 10 * GIB, GIB, used_peak_bytes=10 * GIB),
        PhaseReading("step2.optimizer_step", 10 * GIB, GIB),
    )
    assert [each.needed_bytes - 10 * GIB for each in seen_in(known, readings)] == [7, 0, 0]
