"""The way of another trainer's loop: an exception, its cause, the next plan, with public names alone."""

from __future__ import annotations

import pytest
import torch

import vramplan
from vramplan.recovery import Cause, Exhausted, Lowered, attempt_of, next_plan, verdict_of

RUN = {
    "model": "meta-llama/Llama-3.2-1B-Instruct",
    "method": "lora",
    "seq_len": 2048,
    "global_batch_size": 8,
    "micro_batch_size": 8,
    "hardware": {"gpu": "h100-80gb", "gpus_per_node": 1},
}
CUDA_TEXT = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.5 GiB"
FORWARD = "step2.micro1.forward"


def caught(raising) -> BaseException:
    try:
        raising()
    except RuntimeError as error:
        return error
    raise AssertionError("nothing was raised")


def cross_entropy() -> None:
    raise torch.OutOfMemoryError(CUDA_TEXT)


def test_a_loop_goes_down_until_nothing_is_left():
    plan, history, seen = vramplan.plan(RUN), [], set()
    for _ in range(30):
        verdict = verdict_of(caught(cross_entropy), FORWARD, step=2)
        assert verdict.cause is Cause.LOGITS  # by the function that raised
        assert verdict.memory.requested == 2 * 2**30
        found = next_plan(plan, verdict, history, keep_stage=True)
        if isinstance(found, Exhausted):
            break
        assert isinstance(found, Lowered)
        history.append(attempt_of(plan, verdict))
        plan = found.plan
        assert plan.run.global_batch_size == 8
        assert str(plan.run) not in seen
        seen.add(str(plan.run))
    assert isinstance(found, Exhausted)
    assert seen


def test_a_real_allocation_that_fails_is_told_with_its_size():
    verdict = verdict_of(caught(lambda: torch.empty(2**55, dtype=torch.uint8)), "evaluation")
    assert verdict.cause is Cause.EVALUATION
    assert verdict.memory.requested == 2**55


def test_what_is_not_about_memory_has_no_next_plan():
    verdict = verdict_of(caught(lambda: torch.zeros(2) @ torch.zeros(3)), FORWARD, step=2)
    assert verdict.cause is Cause.ERROR
    with pytest.raises(ValueError, match="another plan does not help: rank 0 failed"):
        next_plan(vramplan.plan(RUN), verdict)
