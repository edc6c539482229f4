"""The least that a run can do with: its leanest candidates, whatever they cost in time."""

from __future__ import annotations

from collections.abc import Iterable

from vramplan.facts.architecture import Architecture
from vramplan.facts.device import Node
from vramplan.memory.estimate import UncoveredError, estimate_run
from vramplan.memory.ledger import Estimate
from vramplan.search.price import Priced, priced
from vramplan.search.room import shortfall
from vramplan.search.trials import used_floor
from vramplan.spec.run import RunSpec


def leanest_fit(run: RunSpec, node: Node, architecture: Architecture) -> Estimate | None:
    """The estimate of some candidate that fits, or None."""
    bounded = _bounded(run, node, architecture)
    may_fit = (each for floor, each in bounded if floor <= node.capacity_bytes)
    estimates = (estimate_run(each.run, node, architecture) for each in may_fit)
    return next((found for found in estimates if found.fits), None)


def fewest_bytes(run: RunSpec, node: Node, architecture: Architecture) -> Estimate:
    """The estimate with the fewest used bytes of the leanest candidates whose host bytes fit, if any does."""
    best: Estimate | None = None
    for floor, each in sorted(_bounded(run, node, architecture), key=lambda pair: pair[0]):
        if best is not None and (False, False, 0, floor) >= shortfall(best):
            break  # the bounds of the rest are no lower
        found = estimate_run(each.run, node, architecture)
        best = found if best is None else min(best, found, key=shortfall)
    assert best is not None  # there is at least one candidate, or it was said why not
    return best


def _bounded(run: RunSpec, node: Node, architecture: Architecture) -> list[tuple[int, Priced]]:
    """The leanest candidates of each layout that are covered, with bytes that they use at least: bytes never fall as
    the micro-batch rises, but without accumulation there are fewer gradient buffers.

    Raises:
        UncoveredError: none is covered.
    """
    uncovered: UncoveredError | None = None
    bounded = []
    for each in _leanest_of_each_layout(priced(run, node, architecture)):
        try:
            bounded.append((used_floor(each.run, node, architecture), each))
        except UncoveredError as error:
            uncovered = error
    if uncovered is not None and not bounded:
        raise uncovered
    return bounded


def _leanest_of_each_layout(every: Iterable[Priced]) -> list[Priced]:
    best: dict[tuple[object, ...], Priced] = {}
    for each in every:
        candidate = each.candidate
        key = (
            candidate.zero_stage,
            candidate.offload_optimizer,
            candidate.offload_param,
            candidate.activation_checkpointing,
            candidate.grad_accum_steps == 1,
        )
        if key not in best or candidate.micro_batch_size < best[key].candidate.micro_batch_size:
            best[key] = each
    # the slowest first: what saves most bytes costs most time
    return sorted(best.values(), key=lambda each: each.seconds_per_sequence, reverse=True)
