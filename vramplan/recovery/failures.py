"""From an exception that a training loop caught to its cause, and from there to the next plan."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Sequence
from typing import Any

from vramplan.facts.resolve import resolve_architecture
from vramplan.measure.marker import OUT_OF_MEMORY_EXIT_CODE, Marker, MemoryState, is_of_host, is_out_of_memory
from vramplan.search.lower import Lowered
from vramplan.search.plan import Plan, plan_id
from vramplan.supervise.attempts import Attempt
from vramplan.supervise.classify import Evidence, Verdict, classify
from vramplan.supervise.ladder import Exhausted, Ladder, judged
from vramplan.train.out_of_memory import memory_state


def verdict_of(error: BaseException, phase: str, step: int = 0, rank: int = 0) -> Verdict:
    """What ended a run, by the exception and by the bytes as they are now: ask before anything is freed.

    Args:
        error: as it was caught, with its traceback.
        phase: what was done, as records name it: ``step2.micro1.forward``, ``evaluation``, ``save``.
        step: the optimizer step, from 1; 0 outside the steps.
        rank: whose error it is.
    """
    kind, message = type(error).__name__, str(error)
    trace = "".join(traceback.format_exception(error))
    ran_out, device = is_out_of_memory(kind, message), _device()
    memory = memory_state(message, 0, 0, of_host=device == "cpu" or is_of_host(kind, message, trace))
    if memory.allocated is None:  # on the host what other things hold is not told from tensors
        memory = MemoryState(requested=memory.requested)
    marker = Marker(
        rank=rank,
        phase=phase,
        kind=kind,
        message=message,
        by_user=False,
        exit_code=OUT_OF_MEMORY_EXIT_CODE if ran_out else 1,
        time=time.time(),
        step=step,
        device=device,
        memory=memory if ran_out else None,
        traceback=trace,
    )
    return classify(Evidence(marker.exit_code, (marker,)))


def attempt_of(plan: Plan, verdict: Verdict) -> Attempt:
    """What ``next_plan`` has to know of a run under ``plan`` that ended by ``verdict``."""
    begun = Attempt(plan=plan_id(plan.run), layout="", cause=verdict.cause.value, time=time.time())
    return judged(begun, plan, resolve_architecture(plan.run), verdict)


def next_plan(
    plan: Plan, verdict: Verdict, history: Sequence[Attempt] = (), *, keep_stage: bool = False
) -> Lowered | Exhausted:
    """The fastest plan that trains the same and needs less where ``plan`` ran out of memory, or why there is none.

    Args:
        plan: the plan that failed.
        verdict: why (``verdict_of``); of a cause that is about memory (``is_memory``).
        history: attempts before this one, so that no plan comes twice and none that needs more than was there.
        keep_stage: whether ZeRO's stage and the places of states and weights must stay, because a checkpoint cannot be
            read otherwise.

    Raises:
        ValueError: the cause is not about memory, so another plan would not help.
    """
    if not verdict.is_memory:
        raise ValueError(f"another plan does not help: {verdict}")
    tried = [*history, attempt_of(plan, verdict)]
    return Ladder(plan, resolve_architecture(plan.run), tried).next(verdict, keep_stage=keep_stage)


def _device() -> str:
    torch: Any = sys.modules.get("torch")
    return "cuda" if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized() else "cpu"
