"""The least that a run can do with: its leanest candidates, whatever they cost in time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from vramplan.facts.architecture import Architecture
from vramplan.facts.device import Node
from vramplan.memory.estimate import UncoveredError, estimate_run
from vramplan.memory.ledger import Estimate
from vramplan.search.price import Priced, priced
from vramplan.search.room import shortfall
from vramplan.spec.run import RunSpec


def leanest_fit(run: RunSpec, node: Node, architecture: Architecture) -> Estimate | None:
    """The estimate of some candidate that fits, or None."""
    return next((found for found in _lean_estimates(run, node, architecture) if found.fits), None)


def fewest_bytes(run: RunSpec, node: Node, architecture: Architecture) -> Estimate:
    """The estimate with the fewest used bytes of the leanest candidates whose host bytes fit, if any does."""
    return min(_lean_estimates(run, node, architecture), key=shortfall)


def _lean_estimates(run: RunSpec, node: Node, architecture: Architecture) -> Iterator[Estimate]:
    """Estimates of the leanest candidates of each layout: bytes never fall as the micro-batch rises, but without
    accumulation there are fewer gradient buffers."""
    uncovered: UncoveredError | None = None
    covered = False
    for each in _leanest_of_each_layout(priced(run, node, architecture)):
        try:
            yield estimate_run(each.run, node, architecture)
            covered = True
        except UncoveredError as error:
            uncovered = error
    if uncovered is not None and not covered:
        raise uncovered


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
