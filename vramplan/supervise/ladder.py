"""The next plan for a run that ran out of memory: asked of the search, held to what was seen, and never one again.

What an attempt saw of memory corrects the estimate in two ways: a rank cannot hold more than it could then
(``capacity_bytes``), and where it needed more than was predicted, the difference is added to every prediction of that
kind of phase. The plan taken is the fastest whose predicted peak in each phase that failed is lower than it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from vramplan.facts.architecture import Architecture
from vramplan.measure.marker import MemoryState
from vramplan.memory.estimate import UncoveredError, estimate_run
from vramplan.memory.ledger import Estimate
from vramplan.search.lower import Below, Lowered
from vramplan.search.plan import Plan, plan_id
from vramplan.search.recalibrate import Correction, Seen, eval_batch, predicted_bytes
from vramplan.search.remedy import with_field
from vramplan.spec.run import RunSpec
from vramplan.supervise.attempts import Attempt
from vramplan.supervise.classify import Cause, Verdict

EXPANDABLE = "expandable_segments:True"
MARGIN_FRAC = 0.02
"""By how much a peak must be lower to count as lower, and the share of the seen capacity that is left free (as the
planner's own margin)."""


@dataclass(frozen=True, slots=True)
class Exhausted:
    """Nothing is left that keeps the training as it is."""

    reason: str


class Ladder:
    """Chooses below ``plan``, given everything that was tried (``history``, this run's attempts so far)."""

    def __init__(self, plan: Plan, architecture: Architecture, history: Sequence[Attempt]) -> None:
        self._plan, self._architecture = plan, architecture
        self._failed = [attempt for attempt in history if attempt.is_memory]
        self._forbidden = {attempt.plan for attempt in self._failed} | {plan_id(plan.run)}
        on_host = plan.node.device.kind == "cpu"
        self._of_device = [each for each in self._failed if on_host or each.cause != Cause.HOST_MEMORY.value]
        """Those whose bytes are of the memory that tensors lie in."""

    def next(self, verdict: Verdict, *, keep_stage: bool) -> Lowered | Exhausted:
        """The next plan after ``verdict``, which is about memory and already in the history."""
        own = self._own_step(verdict)
        if own is not None:
            return own
        below = Below(self._plan, self._architecture, keep_stage=keep_stage)
        found = below.fastest(lambda run, known: self._is_lower(run, known, verdict) and self._fits(known))
        if found is None and self._capacity is not None:
            # the arithmetic says that nothing fits in what was seen; it has been wrong before, so the least is tried
            found = below.leanest(
                lambda run, known: self._is_lower(run, known, verdict),
                lambda _, known: self._bytes(known, verdict.phase, verdict.step),
            )
        return found or Exhausted(self._why_none(keep_stage))

    def _own_step(self, verdict: Verdict) -> Lowered | None:
        """What mends a cause without slowing the training: a setting of the allocator, a smaller evaluation batch, no
        snapshots in the host's memory."""
        run, frees_host = self._plan.run, verdict.cause is Cause.HOST_MEMORY
        if verdict.cause is Cause.FRAGMENTATION and EXPANDABLE not in run.alloc_conf:
            changed = run.model_copy(update={"alloc_conf": ",".join(filter(None, (run.alloc_conf, EXPANDABLE)))})
        elif verdict.cause is Cause.EVALUATION and eval_batch(run) > 1:
            changed = with_field(run, "training.eval_micro_batch_size", self._eval_batch_that_fits(run))
        elif run.training.snapshot_every is not None and (frees_host or verdict.phase == "save"):
            changed = with_field(run, "training.snapshot_every", None)
        else:
            return None
        return None if plan_id(changed) in self._forbidden else self._below_itself(changed)

    def _eval_batch_that_fits(self, run: RunSpec) -> int:
        size = eval_batch(run) // 2
        while size > 1:
            smaller = with_field(run, "training.eval_micro_batch_size", size)
            if self._fits(estimate_run(smaller, self._plan.node, self._architecture)):
                break
            size //= 2
        return size

    def _below_itself(self, run: RunSpec) -> Lowered:
        return Below(self._plan, self._architecture, keep_stage=True).with_run(run)

    @property
    def _capacity(self) -> int | None:
        """The least that was ever seen to be all."""
        return min((a.capacity_bytes for a in self._of_device if a.capacity_bytes is not None), default=None)

    @property
    def room_for_tensors(self) -> int:
        """Bytes that another training may be predicted to need: what was predicted where it failed, less what was
        missing there."""
        limits = [
            a.predicted_bytes - max(int(a.predicted_bytes * MARGIN_FRAC), _missing(a))
            for a in self._of_device
            if a.predicted_bytes is not None
        ]
        return min([self._room, *limits])

    @cached_property
    def _room(self) -> int:
        """Bytes that no phase of the next plan may exceed: the capacity that was seen; where none was, the peak of the
        plan that failed, for it was passed unless it is where it failed; the device's, where it never failed."""
        if not self._of_device:
            return self._plan.node.capacity_bytes
        if self._capacity is not None:
            return int(self._capacity * (1 - MARGIN_FRAC))
        peak = self._plan.prediction.allocated_peak_bytes
        last = next((a.predicted_bytes for a in reversed(self._of_device) if a.plan == plan_id(self._plan.run)), None)
        return peak if last is None or last < peak else int(peak * (1 - MARGIN_FRAC))

    def _is_lower(self, run: RunSpec, known: Estimate, verdict: Verdict) -> bool:
        """Whether a plan is new and needs less in every phase that failed so far."""
        if plan_id(run) in self._forbidden:
            return False
        if self._is_of_host(verdict):
            return known.fits and known.host_bytes_per_node < self._plan.prediction.host_bytes_per_node
        limits = ((a.phase, a.step, a.predicted_bytes) for a in self._of_device if a.predicted_bytes is not None)
        return all(predicted_bytes(known, phase, step) <= limit * (1 - MARGIN_FRAC) for phase, step, limit in limits)

    def _is_of_host(self, verdict: Verdict) -> bool:
        """Whether the memory that ran out is the host's and not that which the ledger's peak counts."""
        return verdict.cause is Cause.HOST_MEMORY and self._plan.node.device.kind != "cpu"

    def _fits(self, known: Estimate) -> bool:
        """Whether every phase, as corrected, stays within the room that there is, and the device."""
        if not known.fits:
            return False
        room = self._room
        phases = [(each.phase, 1 if each.phase.startswith("step1.") else 2) for each in known.phases]
        return all(self._bytes(known, phase, step) <= room for phase, step in phases)

    def _bytes(self, known: Estimate, phase: str, step: int) -> int:
        """The estimate of a phase with what was seen beyond it in phases of its kind."""
        return self._seen.bytes_of(known, phase, step)

    @cached_property
    def _seen(self) -> Correction:
        """What the failures so far have taught of the estimate."""
        return Correction.of(
            Seen(a.phase, a.needed_bytes, a.predicted_bytes)
            for a in self._of_device
            if a.needed_bytes is not None and a.predicted_bytes is not None
        )

    def _why_none(self, keep_stage: bool) -> str:
        tried, run = len(self._forbidden), self._plan.run
        stage = f" with ZeRO {run.zero.stage}, to which {run.optimizer.kind} ties it," if keep_stage else ""
        return (
            f"{tried} plan{'s were' if tried > 1 else ' was'} tried, and no other{stage} needs less there without "
            "changing the training"
        )


def _missing(attempt: Attempt) -> int:
    if attempt.needed_bytes is None or attempt.capacity_bytes is None:
        return 0
    return max(0, attempt.needed_bytes - attempt.capacity_bytes)


def judged(attempt: Attempt, plan: Plan, architecture: Architecture, verdict: Verdict) -> Attempt:
    """An attempt under ``plan`` with its cause, the bytes that were seen at its end, and those that were predicted."""
    memory = verdict.memory or MemoryState()
    return replace(
        attempt,
        cause=verdict.cause.value,
        phase=verdict.phase,
        rank=verdict.rank,
        step=verdict.step,
        requested_bytes=memory.requested,
        held_bytes=memory.held,
        needed_bytes=memory.needed,
        capacity_bytes=memory.capacity,
        predicted_bytes=predicted_of(plan, architecture, verdict) if verdict.is_memory else None,
    )


def predicted_of(plan: Plan, architecture: Architecture, verdict: Verdict) -> int | None:
    """The estimate of the phase that a run ended in; None where the arithmetic does not cover it."""
    try:
        known = estimate_run(plan.run, plan.node, architecture)
    except UncoveredError:
        return None
    return predicted_bytes(known, verdict.phase, verdict.step)
