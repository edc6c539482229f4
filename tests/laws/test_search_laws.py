"""Laws of the search, whatever is asked."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vramplan.errors import NoPlanError
from vramplan.facts.device import Node
from vramplan.facts.devices import find_device
from vramplan.facts.resolve import resolve_architecture
from vramplan.search.fit import Fit, fit_run
from vramplan.search.planner import make_plan
from vramplan.search.price import TIE_FRAC
from vramplan.spec.load import run_from_mapping
from vramplan.spec.run import RunSpec

GIB = 2**30
MODELS = ("HuggingFaceTB/SmolLM2-135M-Instruct", "Qwen/Qwen2.5-0.5B", "meta-llama/Llama-3.2-1B-Instruct")
DEVICES = ("rtx3090", "a100-40gb", "h100-80gb")


@st.composite
def asked(draw: st.DrawFn) -> tuple[RunSpec, Node]:
    ranks = draw(st.sampled_from([1, 2, 4]))
    fields: dict[str, object] = {
        "model": draw(st.sampled_from(MODELS)),
        "seq_len": draw(st.sampled_from([256, 1024, 2048])),
        "global_batch_size": ranks * draw(st.sampled_from([1, 6, 8])),
        "method": draw(st.sampled_from(["full", "lora"])),
        "precision": draw(st.sampled_from(["bf16", "fp32"])),
    }
    cap = draw(st.integers(1, 40)) * GIB // 2
    node = Node(find_device(draw(st.sampled_from(DEVICES))), ranks, host_memory_bytes=64 * GIB, memory_cap_bytes=cap)
    return run_from_mapping(fields), node


def answer(run: RunSpec, node: Node) -> Fit:
    return fit_run(run, node, resolve_architecture(run))


@given(asked())
@settings(max_examples=6, deadline=None)
def test_a_plan_makes_the_batch_and_stays_within_what_is_offered(case: tuple[RunSpec, Node]):
    run, node = case
    found = answer(run, node)
    closed = found.plan.run
    assert closed.global_batch_size == run.global_batch_size
    assert closed.micro_batch_size * closed.grad_accum_steps * node.world_size == run.global_batch_size
    assert found.fits == (found.estimate.used_peak_bytes <= node.capacity_bytes and found.estimate.host_fits)
    assert found.fits or all(refusal.reason for refusal in found.plan.refused)


@given(asked())
@settings(max_examples=6, deadline=None)
def test_plan_and_fit_agree(case: tuple[RunSpec, Node]):
    run, node = case
    found = answer(run, node)
    if found.fits:
        assert make_plan(run, node, resolve_architecture(run)) == found.plan
    else:
        with pytest.raises(NoPlanError, match="no plan fits"):
            make_plan(run, node, resolve_architecture(run))


@given(asked())
@settings(max_examples=8, deadline=None)
def test_more_memory_never_makes_it_unfit_nor_slower(case: tuple[RunSpec, Node]):
    run, node = case
    less = answer(run, node)
    more = answer(run, replace(node, memory_cap_bytes=int((node.memory_cap_bytes or 0) * 1.5)))
    if less.fits:
        assert more.fits
        assert more.plan.prediction.step_time_s <= less.plan.prediction.step_time_s * (1 + TIE_FRAC)


@given(asked())
@settings(max_examples=8, deadline=None)
def test_what_the_planner_chose_may_be_fixed(case: tuple[RunSpec, Node]):
    run, node = case
    found = answer(run, node)
    again = answer(found.plan.run, node)
    assert again.plan.run == found.plan.run
    assert again.fits == found.fits
    assert again.estimate.used_peak_bytes == found.estimate.used_peak_bytes
