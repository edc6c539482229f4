"""Plans below one that met a wall: what a user or the planner fixed is opened again, and the training stays as it is.

The allocator's setting, the micro-batch, the loss's kernel, checkpointing, buckets, ZeRO's stage, offload and how many
ranks share a sequence may change. The global batch, the sequences and the number of ranks do not.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from vramplan.errors import SpecError, VramplanError
from vramplan.facts.architecture import Architecture
from vramplan.memory.estimate import UncoveredError, estimate_run
from vramplan.memory.ledger import Estimate
from vramplan.search.plan import Plan, Prediction
from vramplan.search.price import TIE_FRAC, Priced, priced
from vramplan.search.remedy import get_field, with_field, with_open
from vramplan.search.space import divisors
from vramplan.spec.check import check_run
from vramplan.spec.layout import Layout
from vramplan.spec.run import Loss, RunSpec

RUNGS = (
    "training.eval_micro_batch_size",
    "training.snapshot_every",
    "alloc_conf",
    "micro_batch_size",
    "grad_accum_steps",
    "loss",
    "activation_checkpointing",
    "checkpoint_every",
    "zero.reduce_bucket_size",
    "zero.stage3_prefetch_bucket_size",
    "zero.stage",
    "zero.overlap_comm",
    "zero.offload_optimizer",
    "zero.offload_param",
    "layout.dp",
    "layout.sp",
)
"""Fields that may change, in the order in which they are changed where that costs about the same time."""
_BUCKETS = ("zero.reduce_bucket_size", "zero.stage3_prefetch_bucket_size")
_BUCKET_DIVISORS = (1, 8, 64)
LEAST_BUCKET = 1_000_000
"""Elements: a smaller bucket saves less than it costs in messages."""

Accept = Callable[[RunSpec, Estimate], bool]
Measure = Callable[[RunSpec, Estimate], int]


@dataclass(frozen=True, slots=True)
class Lowered:
    """A plan found below another, and what of it is changed."""

    plan: Plan
    estimate: Estimate
    changes: tuple[tuple[str, Any], ...]
    """Fields with their new values, in the order of ``RUNGS``."""


class Below:
    """The plans that a plan can be exchanged for.

    ``keep_stage``: whether ZeRO's stage and the places of states and weights must stay.
    """

    def __init__(self, plan: Plan, architecture: Architecture, *, keep_stage: bool) -> None:
        self._plan, self._architecture = plan, architecture
        opened = _opened(plan.run, keep_stage)
        every = [
            replace(each, run=each.run.model_copy(update={"loss": loss}))
            for layout in more_sequence_parallel(opened)
            for run in _variants(layout)
            for each in self._priced(run)
            if each.run.activation_checkpointing == "full" or each.run.checkpoint_every == opened.checkpoint_every
            for loss in self._losses()
        ]
        self._ranked = sorted(every, key=lambda each: each.seconds_per_sequence)

    def fastest(self, accept: Accept) -> Lowered | None:
        """The fastest that ``accept`` takes; of about equally fast ones that which changes least."""
        found: list[tuple[Priced, Estimate]] = []
        for each in self._ranked:
            if found and each.seconds_per_sequence > found[0][0].seconds_per_sequence * (1 + TIE_FRAC):
                break
            known = self._estimate(each.run)
            if known is not None and accept(each.run, known):
                found.append((each, known))
        if not found:
            return None
        best, known = min(found, key=lambda pair: _height(self._plan.run, pair[0].run))
        return self._lowered(best.run, known, best.step_time_s)

    def leanest(self, accept: Accept, measure: Measure) -> Lowered | None:
        """That with the fewest bytes by ``measure`` of those that ``accept`` takes, whatever its speed."""
        found = [
            (measure(each.run, known), place, each, known)
            for place, each in enumerate(self._ranked)
            if (known := self._estimate(each.run)) is not None and accept(each.run, known)
        ]
        if not found:
            return None
        _, _, best, known = min(found, key=lambda entry: entry[:2])
        return self._lowered(best.run, known, best.step_time_s)

    def with_run(self, run: RunSpec) -> Lowered:
        """The plan with a run of the same speed."""
        return self._lowered(
            run, estimate_run(run, self._plan.node, self._architecture), self._plan.prediction.step_time_s
        )

    def _losses(self) -> Iterator[Loss]:
        """Those that the plan's ranks can compute and its methods go with; step times do not tell them apart."""
        has_liger = importlib.util.find_spec("liger_kernel") is not None and self._plan.node.device.kind != "cpu"
        losses: tuple[Loss, ...] = (self._plan.run.loss, "hf", "chunked")
        for loss in dict.fromkeys((*losses, "liger") if has_liger else losses):
            with suppress(SpecError):  # e.g. logits that a method needs: the other losses are left
                check_run(self._plan.run.model_copy(update={"loss": loss}))
                yield loss

    def _priced(self, run: RunSpec) -> list[Priced]:
        try:
            return priced(run, self._plan.node, self._architecture)
        except VramplanError:  # e.g. a loss that the device lacks: the other variants are left
            return []

    def _estimate(self, run: RunSpec) -> Estimate | None:
        try:
            return estimate_run(run, self._plan.node, self._architecture)
        except UncoveredError:
            return None

    def _lowered(self, run: RunSpec, known: Estimate, step_time_s: float) -> Lowered:
        plan = Plan(
            run,
            self._plan.node,
            Prediction.of(run, known, step_time_s),
            self._plan.margin_frac,
            (),
            self._plan.versions,
        )
        return Lowered(plan, known, changes(self._plan.run, run))


def changes(before: RunSpec, after: RunSpec) -> tuple[tuple[str, Any], ...]:
    """Fields of ``RUNGS`` that differ, with their new values."""
    names = (name for name in RUNGS if get_field(before, name) != get_field(after, name))
    return tuple((name, get_field(after, name)) for name in names)


def with_changes(run: RunSpec, changed: Mapping[str, Any]) -> RunSpec:
    """``run`` with fields by their dotted names set."""
    for name, value in changed.items():
        run = with_field(run, name, value)
    return run


def words_of(changed: tuple[tuple[str, Any], ...]) -> str:
    """E.g. ``micro_batch_size 2, grad_accum_steps 4``."""
    return ", ".join(f"{name} {value}" for name, value in changed)


def _height(before: RunSpec, after: RunSpec) -> tuple[int, int]:
    """Orders equally fast plans: by the last rung that is stepped on, then by how many are."""
    changed = changes(before, after)
    return max((RUNGS.index(name) for name, _ in changed), default=-1), len(changed)


def _opened(run: RunSpec, keep_stage: bool) -> RunSpec:
    free = with_open(run, ("micro_batch_size", "activation_checkpointing"))
    if keep_stage:
        return free
    if run.zero.overlap_comm == (run.zero.stage == 3):  # DeepSpeed's default for the stage, which goes with it
        free = with_field(free, "zero.overlap_comm", None)
    return with_open(free, ("zero.stage", "zero.offload_optimizer", "zero.offload_param"))


def more_sequence_parallel(run: RunSpec) -> Iterator[RunSpec]:
    """``run``, and the same with the next larger number of ranks that share a sequence: the states are cut over as many
    ranks (``Layout.zero_degree``), the global batch among fewer groups."""
    yield run
    layout = run.layout or Layout()
    for factor in divisors(layout.dp)[1:2]:
        yield with_field(with_field(run, "layout.dp", layout.dp // factor), "layout.sp", layout.sp * factor)


def _variants(run: RunSpec) -> Iterator[RunSpec]:
    """``run`` with every layer recomputed, and with smaller buckets."""
    sizes = dict.fromkeys(tuple(_smaller(get_field(run, name), by) for name in _BUCKETS) for by in _BUCKET_DIVISORS)
    for every, chosen in product(dict.fromkeys((run.checkpoint_every, 1)), sizes):
        smaller = run.model_copy(update={"checkpoint_every": every})
        for name, size in zip(_BUCKETS, chosen, strict=True):
            smaller = with_field(smaller, name, size)
        yield smaller


def _smaller(size: int, divisor: int) -> int:
    return max(size // divisor, min(size, LEAST_BUCKET))
