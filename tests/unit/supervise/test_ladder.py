"""The next plan: lower where it failed, within what was seen, new, and the same training."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from vramplan.facts.devices import resolve_node
from vramplan.facts.resolve import resolve_architecture
from vramplan.measure.marker import MemoryState
from vramplan.memory.estimate import estimate_run
from vramplan.search.lower import RUNGS, Below, changes
from vramplan.search.plan import Plan, plan_id
from vramplan.search.planner import make_plan
from vramplan.search.recalibrate import eval_batch, predicted_bytes
from vramplan.search.remedy import with_field
from vramplan.spec.run import HardwareSpec, OptimizerSpec, RunSpec, ZeroSpec
from vramplan.spec.training import TrainingSpec
from vramplan.supervise.attempts import Attempt
from vramplan.supervise.classify import Cause, Verdict
from vramplan.supervise.ladder import Exhausted, Ladder, predicted_of

GIB = 2**30
FORWARD, BACKWARD = "step2.micro1.forward", "step7.micro1.backward"


def plan_for(gpu: str = "h100-80gb", gpus: int = 4, **fields) -> Plan:
    base = {
        "model": "meta-llama/Llama-3.2-1B-Instruct",
        "global_batch_size": 64,
        "seq_len": 2048,
        "hardware": HardwareSpec(gpu=gpu, gpus_per_node=gpus, host_memory="512GiB"),
    }
    run = RunSpec(**{**base, **fields})
    return make_plan(run, resolve_node(run.hardware), resolve_architecture(run))


@pytest.fixture(scope="module")
def plan() -> Plan:
    return plan_for()


def failed(plan: Plan, cause: Cause, phase: str, memory: MemoryState | None = None, step: int = 2):
    architecture = resolve_architecture(plan.run)
    verdict = Verdict(cause, phase, 0, step, memory)
    seen = memory or MemoryState()
    attempt = Attempt(
        plan=plan_id(plan.run),
        layout="",
        cause=cause.value,
        phase=phase,
        step=step,
        needed_bytes=seen.needed,
        capacity_bytes=seen.capacity,
        predicted_bytes=predicted_of(plan, architecture, verdict),
    )
    return architecture, verdict, attempt


def test_the_next_plan_is_lower_in_the_phase_that_failed_and_trains_the_same(plan):
    architecture, verdict, attempt = failed(plan, Cause.ACTIVATIONS, BACKWARD)
    found = Ladder(plan, architecture, [attempt]).next(verdict, keep_stage=False)
    before, after = plan.run, found.plan.run
    peak = predicted_bytes(found.estimate, BACKWARD, 7)
    assert peak < attempt.predicted_bytes
    assert after.global_batch_size == before.global_batch_size == 64
    assert after.micro_batch_size * after.grad_accum_steps * 4 == 64
    assert after.layout == before.layout
    assert after.optimizer == before.optimizer
    assert {name for name, _ in found.changes} <= set(RUNGS)
    assert found.changes == changes(before, after)


def test_the_seen_capacity_holds_for_every_phase_and_the_bytes_beyond_the_estimate_are_added(plan):
    architecture, verdict, attempt = failed(plan, Cause.ACTIVATIONS, BACKWARD)
    predicted = attempt.predicted_bytes
    memory = MemoryState(requested=3 * GIB, allocated=predicted, reserved=predicted, free=GIB)
    architecture, verdict, attempt = failed(plan, Cause.ACTIVATIONS, BACKWARD, memory)
    found = Ladder(plan, architecture, [attempt]).next(verdict, keep_stage=False)
    beyond = attempt.needed_bytes - predicted
    assert beyond == 3 * GIB
    assert predicted_bytes(found.estimate, BACKWARD, 7) + beyond <= memory.capacity
    assert max(phase.peak_bytes for phase in found.estimate.phases) <= memory.capacity


def test_a_faster_plan_that_fits_what_was_seen_is_preferred_to_a_leaner_one():
    plan = plan_for(gpus=2, global_batch_size=8, micro_batch_size=4)
    architecture, verdict, attempt = failed(plan, Cause.ACTIVATIONS, BACKWARD)
    roomy = Ladder(plan, architecture, [attempt]).next(verdict, keep_stage=False)
    small = replace(attempt, capacity_bytes=16 * GIB)
    lean = Ladder(plan, architecture, [small]).next(verdict, keep_stage=False)
    assert lean.estimate.allocated_peak_bytes <= 16 * GIB < roomy.estimate.allocated_peak_bytes
    assert lean.plan.prediction.step_time_s > roomy.plan.prediction.step_time_s


def test_going_down_ends_and_never_comes_back():
    plan = plan_for(global_batch_size=2, gpus=2)
    architecture = resolve_architecture(plan.run)
    tried, current = [], plan
    for _ in range(200):
        _, verdict, attempt = failed(current, Cause.ACTIVATIONS, BACKWARD)
        tried.append(attempt)
        found = Ladder(current, architecture, tried).next(verdict, keep_stage=False)
        if isinstance(found, Exhausted):
            break
        current = found.plan
        assert plan_id(current.run) not in {each.plan for each in tried}
    assert isinstance(found, Exhausted)
    peaks = [each.predicted_bytes for each in tried]
    assert all(after <= before * 0.98 for before, after in pairwise(peaks))
    assert "without changing the training" in found.reason


def test_a_stage_that_checkpoints_depend_on_is_kept(plan):
    fixed = plan_for(zero=ZeroSpec(stage=1, offload_optimizer="none", offload_param="none"))
    architecture, verdict, attempt = failed(fixed, Cause.ACTIVATIONS, BACKWARD)
    attempt = replace(attempt, capacity_bytes=attempt.predicted_bytes // 2)
    found = Ladder(fixed, architecture, [attempt]).next(verdict, keep_stage=True)
    assert found.plan.run.zero.stage == 1
    assert found.plan.run.zero.offload_optimizer == "none"


def test_the_first_step_goes_up_a_stage_or_off_the_device():
    fixed = plan_for(zero=ZeroSpec(stage=0, offload_optimizer="none", offload_param="none"), micro_batch_size=1)
    architecture, verdict, attempt = failed(fixed, Cause.FIRST_STEP, "step1.micro16.optimizer_step", step=1)
    found = Ladder(fixed, architecture, [attempt]).next(verdict, keep_stage=False)
    assert found.plan.run.zero.stage > 0
    kept = Ladder(fixed, architecture, [attempt]).next(verdict, keep_stage=True)
    assert isinstance(kept, Exhausted)
    assert "ZeRO 0" in kept.reason


def test_states_in_8_bits_stay_as_they_are_cut_and_the_reason_says_so():
    tied = plan_for(
        zero=ZeroSpec(stage=0, offload_optimizer="none", offload_param="none"),
        optimizer=OptimizerSpec(kind="adamw_8bit"),
        micro_batch_size=1,
    )
    architecture, verdict, attempt = failed(tied, Cause.FIRST_STEP, "step1.micro16.optimizer_step", step=1)
    kept = Ladder(tied, architecture, [attempt]).next(verdict, keep_stage=True)
    assert isinstance(kept, Exhausted)
    assert "no other with ZeRO 0, to which adamw_8bit ties it, needs less there" in kept.reason


def test_ranks_share_a_sequence_where_one_alone_is_too_long():
    long = plan_for(
        seq_len=32768, global_batch_size=8, micro_batch_size=1, activation_checkpointing="full", loss="chunked"
    )
    architecture, verdict, attempt = failed(long, Cause.ACTIVATIONS, BACKWARD)
    found = Ladder(long, architecture, [attempt]).next(verdict, keep_stage=True)
    changed, layout = dict(found.changes), found.plan.run.layout
    assert changed["layout.sp"] == layout.sp > 1
    assert layout.dp * layout.sp == 4
    run = found.plan.run
    assert run.micro_batch_size * run.grad_accum_steps * layout.dp == run.global_batch_size == 8
    assert run.seq_len == 32768


def test_logits_that_do_not_fit_are_met_with_a_loss_that_keeps_them_in_their_own_format():
    whole = plan_for(micro_batch_size=1, activation_checkpointing="full", layout={"dp": 4})
    architecture, verdict, attempt = failed(whole, Cause.LOGITS, BACKWARD)
    losses = {each.loss for each in below_of(whole, architecture)}
    assert {"hf", "chunked"} <= losses
    found = Ladder(whole, architecture, [attempt]).next(verdict, keep_stage=True)
    assert dict(found.changes).get("loss") in ("chunked", "liger")


def test_a_loss_without_logits_is_not_tried_where_a_method_needs_them(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())  # liger is installed
    architecture = resolve_architecture(RunSpec(model="meta-llama/Llama-3.2-1B-Instruct"))
    for retain, expected in (({}, {"hf", "chunked", "liger"}), ({"kl": {"weight": 0.1}}, {"hf", "chunked"})):
        plan = plan_for(method={"kind": "lora"}, micro_batch_size=1, layout={"dp": 4}, retain=retain)
        assert {each.loss for each in below_of(plan, architecture)} == expected


def test_recomputing_one_layer_of_two_becomes_recomputing_all():
    half = plan_for(micro_batch_size=1, activation_checkpointing="full", checkpoint_every=2, layout={"dp": 4})
    architecture, verdict, attempt = failed(half, Cause.ACTIVATIONS, BACKWARD)
    runs = {(each.activation_checkpointing, each.checkpoint_every) for each in below_of(half, architecture)}
    assert runs == {("full", 2), ("full", 1), ("none", 2)}
    assert not isinstance(Ladder(half, architecture, [attempt]).next(verdict, keep_stage=True), Exhausted)


def below_of(plan: Plan, architecture):
    return [each.run for each in Below(plan, architecture, keep_stage=True)._ranked]


@pytest.mark.parametrize("cause", [Cause.SAVE, Cause.HOST_MEMORY])
def test_a_save_that_does_not_fit_goes_without_snapshots_and_nothing_else(cause):
    keen = plan_for(training=TrainingSpec(snapshot_every=1))
    architecture, verdict, attempt = failed(keen, cause, "save")
    found = Ladder(keen, architecture, [attempt]).next(verdict, keep_stage=True)
    assert found.changes == (("training.snapshot_every", None),)


def test_fragmentation_is_met_with_the_allocators_setting_and_nothing_else(plan):
    memory = MemoryState(requested=GIB, allocated=10 * GIB, reserved=12 * GIB, free=0)
    architecture, verdict, attempt = failed(plan, Cause.FRAGMENTATION, BACKWARD, memory)
    found = Ladder(plan, architecture, [attempt]).next(verdict, keep_stage=True)
    assert found.changes == (("alloc_conf", "expandable_segments:True"),)
    _, verdict, again = failed(found.plan, Cause.FRAGMENTATION, BACKWARD, memory)
    after = Ladder(found.plan, architecture, [attempt, again]).next(verdict, keep_stage=True)
    assert after.plan.run.alloc_conf == "expandable_segments:True"
    assert len(after.changes) >= 1


def test_an_evaluation_that_does_not_fit_gets_smaller_batches_and_the_training_stays(plan):
    wide = plan_for(micro_batch_size=8)
    architecture, verdict, attempt = failed(wide, Cause.EVALUATION, "evaluation")
    found = Ladder(wide, architecture, [attempt]).next(verdict, keep_stage=True)
    assert found.changes == (("training.eval_micro_batch_size", eval_batch(found.plan.run)),)
    assert eval_batch(found.plan.run) < 8
    assert found.plan.run.micro_batch_size == 8
    assert plan_id(found.plan.run) != plan_id(wide.run)


def test_host_memory_on_a_gpu_node_moves_less_to_the_host():
    moved = plan_for(zero=ZeroSpec(stage=2, offload_optimizer="cpu", offload_param="none"))
    architecture, verdict, attempt = failed(moved, Cause.HOST_MEMORY, "step1.micro1.optimizer_step")
    found = Ladder(moved, architecture, [attempt]).next(verdict, keep_stage=False)
    assert found.plan.prediction.host_bytes_per_node < moved.prediction.host_bytes_per_node
    assert found.estimate.fits


def test_what_was_moved_to_a_host_that_has_no_room_comes_back_to_the_device():
    """The device did not fail, so it may hold more than under the plan that the host failed under."""
    moved = plan_for(
        zero=ZeroSpec(stage=2, offload_optimizer="cpu", offload_param="none"),
        micro_batch_size=1,
        activation_checkpointing="full",
    )
    gathered = MemoryState(requested=3 * GIB, reserved=100 * GIB, free=GIB)  # of the host
    architecture, verdict, attempt = failed(moved, Cause.HOST_MEMORY, "step1.micro16.optimizer_step", gathered, step=1)
    found = Ladder(moved, architecture, [attempt]).next(verdict, keep_stage=False)
    assert found.plan.run.zero.offload_optimizer == "none"
    assert found.estimate.allocated_peak_bytes > moved.prediction.allocated_peak_bytes
    assert found.estimate.fits


def test_what_the_host_had_left_says_nothing_of_the_device():
    plan = plan_for(gpus=2, global_batch_size=8, micro_batch_size=4)
    of_host = MemoryState(requested=GIB, reserved=GIB, free=0)
    architecture, _, host = failed(plan, Cause.HOST_MEMORY, FORWARD, of_host)
    _, verdict, device = failed(plan, Cause.ACTIVATIONS, BACKWARD)
    alone = Ladder(plan, architecture, [device]).next(verdict, keep_stage=False)
    after = Ladder(plan, architecture, [host, device]).next(verdict, keep_stage=False)
    assert after.changes == alone.changes


def test_snapshots_go_first_where_the_hosts_memory_ran_out_in_a_step():
    keen = plan_for(training=TrainingSpec(snapshot_every=1))
    architecture, verdict, attempt = failed(keen, Cause.HOST_MEMORY, FORWARD)
    found = Ladder(keen, architecture, [attempt]).next(verdict, keep_stage=True)
    assert found.changes == (("training.snapshot_every", None),)


def test_evaluation_and_save_are_predicted_by_the_estimate(plan):
    architecture = resolve_architecture(plan.run)
    known = estimate_run(plan.run, plan.node, architecture)
    between, forward = known.between_steps_bytes, predicted_bytes(known, FORWARD, 2)
    save, evaluation = (predicted_bytes(known, phase, 5) for phase in ("save", "evaluation"))
    assert between < save <= evaluation < forward
    alone = with_field(plan.run, "training.eval_micro_batch_size", 1)
    fewer = estimate_run(alone, plan.node, architecture)
    assert predicted_bytes(fewer, "evaluation", 5) == save
    assert predicted_bytes(known, "data", 0) == between
