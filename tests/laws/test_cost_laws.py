"""Laws of the step time, whatever the run."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from vramplan.cost.step_time import step_time_s
from vramplan.cost.traffic import step_traffic
from vramplan.facts.device import Node
from vramplan.facts.devices import all_devices
from vramplan.facts.resolve import resolve_architecture
from vramplan.spec.load import merge, run_from_mapping
from vramplan.spec.run import RunSpec

MODELS = ("HuggingFaceTB/SmolLM2-135M", "Qwen/Qwen2.5-7B-Instruct", "meta-llama/Llama-3.1-70B", "openai-community/gpt2")
POWERS = st.sampled_from([1, 2, 4, 8, 16])


@st.composite
def closed_runs(draw: st.DrawFn) -> tuple[RunSpec, Node]:
    ranks = draw(POWERS)
    fields = {
        "model": draw(st.sampled_from(MODELS)),
        "seq_len": draw(st.sampled_from([128, 512, 1024])),
        "micro_batch_size": draw(POWERS),
        "grad_accum_steps": draw(POWERS),
        "precision": draw(st.sampled_from(["bf16", "fp32", "bf16-autocast"])),
        "attention": draw(st.sampled_from(["sdpa", "eager"])),
        "method": draw(st.sampled_from(["full", "lora", "qlora"])),
        "activation_checkpointing": draw(st.sampled_from(["none", "full"])),
        "zero": {
            "stage": draw(st.sampled_from([0, 1, 2, 3])),
            "offload_optimizer": "none",
            "offload_param": "none",
        },
        "layout": {"dp": ranks},
    }
    return run_from_mapping(fields), Node(draw(st.sampled_from(all_devices())), ranks)


def seconds(run: RunSpec, node: Node, **fields: object) -> float:
    changed = run_from_mapping(merge(run.model_dump(), fields))
    return step_time_s(changed, node, resolve_architecture(changed))


@given(closed_runs())
@settings(max_examples=60, deadline=None)
def test_a_step_takes_time_and_more_work_takes_no_less(case: tuple[RunSpec, Node]):
    run, node = case
    base = seconds(run, node)
    assert base > 0
    assert seconds(run, node, seq_len=run.seq_len * 2) >= base
    assert seconds(run, node, micro_batch_size=(run.micro_batch_size or 1) * 2) >= base
    assert seconds(run, node, grad_accum_steps=(run.grad_accum_steps or 1) * 2) > base


@given(closed_runs())
@settings(max_examples=60, deadline=None)
def test_recomputing_and_offloading_never_save_time(case: tuple[RunSpec, Node]):
    run, node = case
    assert seconds(run, node, activation_checkpointing="full") >= seconds(run, node, activation_checkpointing="none")
    if run.zero.stage:
        assert seconds(run, node, zero={"offload_optimizer": "cpu"}) > seconds(run, node)


@given(closed_runs())
@settings(max_examples=60, deadline=None)
def test_stages_1_to_3_never_get_faster_and_move_no_less(case: tuple[RunSpec, Node]):
    run, node = case
    times = [seconds(run, node, zero={"stage": stage}) for stage in (1, 2, 3)]
    assert times == sorted(times)
    moved = []
    for stage in (0, 1, 2):
        staged = run_from_mapping(merge(run.model_dump(), {"zero": {"stage": stage}}))
        moved.append(step_traffic(staged, resolve_architecture(staged)).link_bytes)
    assert moved == sorted(moved)


@given(closed_runs())
@settings(max_examples=60, deadline=None)
def test_the_same_batch_in_larger_micro_batches_is_no_slower(case: tuple[RunSpec, Node]):
    run, node = case
    accum = run.grad_accum_steps or 1
    halved = seconds(run, node, micro_batch_size=(run.micro_batch_size or 1), grad_accum_steps=accum * 2)
    doubled = seconds(run, node, micro_batch_size=(run.micro_batch_size or 1) * 2, grad_accum_steps=accum)
    assert doubled <= halved
