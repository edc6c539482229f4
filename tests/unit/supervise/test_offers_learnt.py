"""What changes the training is offered with its cost; what went through is remembered for this plan and machine."""

from __future__ import annotations

import resource
from dataclasses import replace

import pytest

from vramplan.facts.devices import resolve_node
from vramplan.facts.resolve import resolve_architecture
from vramplan.search.lower import changes, with_changes, words_of
from vramplan.search.plan import Plan
from vramplan.search.planner import make_plan
from vramplan.spec.run import HardwareSpec, RunSpec
from vramplan.supervise.learnt import recall, remember
from vramplan.supervise.offers import first_allowed, offers

GIB = 2**30


@pytest.fixture(scope="module")
def plan() -> Plan:
    run = RunSpec(
        model="meta-llama/Llama-3.2-1B-Instruct",
        global_batch_size=8,
        seq_len=2048,
        hardware=HardwareSpec(gpu="rtx4090", gpus_per_node=1, host_memory="64GiB"),
    )
    return make_plan(run, resolve_node(run.hardware), resolve_architecture(run))


def test_offers_fit_into_the_room_and_say_what_they_cost(plan):
    room = 10 * GIB
    every = offers(plan, resolve_architecture(plan.run), room)
    assert {"method"} in [set(offer.needs) for offer in every]
    for offer in every:
        assert offer.plan.prediction.allocated_peak_bytes <= room
        assert offer.plan.run.global_batch_size == 8
        assert offer.plan.node == plan.node
        assert "GiB, about" in str(offer)
        assert "--allow" in str(offer)
    times = [offer.plan.prediction.step_time_s for offer in every]
    assert times == sorted(times)


def test_only_what_is_allowed_is_done_and_adapters_get_their_own_rate(plan):
    every = offers(plan, resolve_architecture(plan.run), 10 * GIB)
    assert first_allowed(every, ()) is None
    offer = first_allowed(every, ("method",))
    assert offer.plan.run.method.kind == "lora"
    assert offer.plan.run.optimizer.lr == 2e-4
    assert plan.run.optimizer.lr == 1e-5


def test_a_lesson_is_of_one_plan_machine_and_version(plan, tmp_path):
    path = tmp_path / "learnt.jsonl"
    assert recall(plan, path) is None
    remember(plan, {"micro_batch_size": 2}, "activations", "step2.micro1.forward", path)
    remember(plan, {"micro_batch_size": 1, "grad_accum_steps": 8}, "saving", "save", path)
    with path.open("a") as file:
        file.write('{"plan": "half a li')
    lesson = recall(plan, path)
    assert lesson.changes == {"micro_batch_size": 1, "grad_accum_steps": 8}
    assert lesson.phase == "save"
    other_node = replace(plan, node=replace(plan.node, gpus_per_node=2))
    other_run = replace(plan, run=plan.run.model_copy(update={"seq_len": 1024}))
    assert recall(other_node, path) is None
    assert recall(other_run, path) is None
    assert recall(replace(plan, versions={"torch": "1"}), path) is None
    longer = plan.run.training.model_copy(update={"max_steps": 7})
    assert recall(replace(plan, run=plan.run.model_copy(update={"training": longer})), path) == lesson


def test_a_lesson_under_a_limit_is_not_one_without_it(plan, tmp_path):
    path = tmp_path / "learnt.jsonl"
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (1 << 40, hard))
    try:
        remember(plan, {"micro_batch_size": 1}, "activations", "step1.micro1.forward", path)
        assert recall(plan, path) is not None
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
    assert recall(plan, path) is None


def test_changes_lead_from_one_run_to_the_other(plan):
    wanted = {"micro_batch_size": 1, "grad_accum_steps": 8, "zero.stage": 2, "training.eval_micro_batch_size": 1}
    changed = with_changes(plan.run, wanted)
    assert with_changes(plan.run, dict(changes(plan.run, changed))) == changed
    assert "zero.stage 2" in words_of(changes(plan.run, changed))
