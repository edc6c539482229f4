"""The search: of all legal candidates the fastest that fits, and why every better-looking one was refused."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from vramplan.cost.step_time import CostModel
from vramplan.errors import LegalityError, NoPlanError
from vramplan.facts.architecture import Architecture
from vramplan.facts.device import Node
from vramplan.memory.estimate import UncoveredError, estimate
from vramplan.memory.ledger import Estimate
from vramplan.search.legality import Illegality, illegality
from vramplan.search.plan import Refusal
from vramplan.search.space import Candidate, candidates
from vramplan.spec.run import RunSpec
from vramplan.units import format_bytes

MARGIN_FRAC = 0.02
"""Share of the capacity that a plan leaves free, for what the arithmetic does not see.
ASSUMED: twice the estimator's own aim of 1 %."""


TIE_FRAC = 0.02
"""Step times that differ by less are called equal: their efficiencies are assumed, so the simpler plan is better."""


@dataclass(frozen=True, slots=True)
class Priced:
    """A legal candidate, closed, with its step time."""

    candidate: Candidate
    run: RunSpec
    step_time_s: float

    @property
    def rank(self) -> tuple[int, bool, bool, bool, int, float]:
        """Orders candidates by seconds per sequence; of about equally fast ones the simpler comes first."""
        candidate = self.candidate
        seconds = self.step_time_s / (self.run.global_batch_size or 1)
        return (
            math.floor(math.log(seconds) / math.log1p(TIE_FRAC)),
            candidate.offload_optimizer != "none",
            candidate.offload_param != "none",
            candidate.activation_checkpointing != "none",
            candidate.zero_stage,
            seconds,
        )


@dataclass(frozen=True, slots=True)
class Answer:
    """What a search found."""

    chosen: Priced | None
    """The fastest candidate that fits; None where none does."""
    estimate: Estimate
    """Of the chosen candidate, or of the leanest where none fits."""
    leanest: Priced
    """The candidate with the fewest bytes of those that were tried."""
    refused: tuple[Refusal, ...]
    margin_frac: float
    """0 where only a candidate without any margin fits."""


def search(run: RunSpec, node: Node, architecture: Architecture, margin_frac: float = MARGIN_FRAC) -> Answer:
    """Tries candidates from the best-looking on, until one fits.

    One that fits only without the margin is taken where no other fits; one whose bytes the arithmetic does not cover
    is passed over, with that as the reason.

    Raises:
        NoPlanError: no candidate can be made; the text says which number to change.
        LegalityError: DeepSpeed refuses every one.
        UncoveredError: the arithmetic covers none.
    """
    check_sequence_length(run, architecture)
    ranked = sorted(priced(run, node, architecture), key=lambda each: each.rank)
    refused: list[Refusal] = []
    tried: list[tuple[Priced, Estimate, int]] = []
    uncovered: UncoveredError | None = None
    for each in ranked:
        try:
            found = estimate(each.run, node, architecture)
        except UncoveredError as error:
            uncovered = error
            refused.append(_refuse(each, str(error)))
            continue
        if fits_with_margin(found, margin_frac):
            return Answer(each, found, each, tuple(refused), margin_frac)
        tried.append((each, found, len(refused)))
        refused.append(_refuse(each, why_not(found, margin_frac), found))
    if not tried and uncovered is not None:
        raise uncovered
    for each, found, num_better in tried:
        if found.fits:
            return Answer(each, found, each, tuple(refused[:num_better]), 0.0)
    leanest, found, _ = min(tried, key=lambda trial: _shortfall(trial[1]))
    return Answer(None, found, leanest, tuple(refused), margin_frac)


def check_sequence_length(run: RunSpec, architecture: Architecture) -> None:
    """Raises NoPlanError where the model has fewer positions than a sequence has tokens."""
    if 0 < architecture.max_positions < run.seq_len:
        raise NoPlanError(
            f"seq_len {run.seq_len} is longer than the {architecture.max_positions} positions of {run.model}: "
            f"set seq_len to {architecture.max_positions} or less"
        )


def priced(run: RunSpec, node: Node, architecture: Architecture) -> list[Priced]:
    """Every legal candidate with its step time.

    Raises:
        LegalityError: DeepSpeed refuses every one; the text gives its reason.
    """
    cost = CostModel(run, node, architecture)
    legal: list[Priced] = []
    reasons: dict[Illegality, None] = {}
    for candidate in candidates(run, node):
        closed = candidate.close(run, node)
        reason = illegality(closed, node, architecture)
        if reason is None:
            legal.append(Priced(candidate, closed, cost.step_time(closed).total_s))
        else:
            reasons.setdefault(reason)
    if not legal:
        raise LegalityError("; ".join(f"{each.reason} ({each.source})" for each in reasons))
    return legal


def fits_with_margin(found: Estimate, margin_frac: float) -> bool:
    """Whether an estimate leaves ``margin_frac`` of the device's capacity free, and the host's bytes fit."""
    return found.host_fits and found.used_peak_bytes <= int(found.capacity_bytes * (1 - margin_frac))


def leanest_fit(run: RunSpec, node: Node, architecture: Architecture) -> Estimate | None:
    """The estimate of some candidate that fits, or None."""
    return next((found for found in _lean_estimates(run, node, architecture) if found.fits), None)


def fewest_bytes(run: RunSpec, node: Node, architecture: Architecture) -> Estimate:
    """The estimate with the fewest used bytes of the leanest candidates whose host bytes fit, if any does."""
    return min(_lean_estimates(run, node, architecture), key=_shortfall)


def _lean_estimates(run: RunSpec, node: Node, architecture: Architecture) -> Iterator[Estimate]:
    """Estimates of the leanest candidates of each layout: bytes never fall as the micro-batch rises, but without
    accumulation there are fewer gradient buffers."""
    uncovered: UncoveredError | None = None
    covered = False
    for each in _leanest_of_each_layout(priced(run, node, architecture)):
        try:
            yield estimate(each.run, node, architecture)
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
    return sorted(best.values(), key=lambda each: each.rank, reverse=True)


def _shortfall(found: Estimate) -> tuple[bool, int]:
    return (not found.host_fits, found.used_peak_bytes)


def _refuse(each: Priced, reason: str, found: Estimate | None = None) -> Refusal:
    return Refusal(
        candidate=each.candidate,
        reason=reason,
        step_time_s=each.step_time_s,
        tokens_per_s=(each.run.global_batch_size or 0) * each.run.seq_len / each.step_time_s,
        used_peak_bytes=None if found is None else found.used_peak_bytes,
        peak_moment=None if found is None else found.peak.name,
    )


def why_not(found: Estimate, margin_frac: float) -> str:
    """One clause: what does not fit in an estimate."""
    used, capacity = found.used_peak_bytes, found.capacity_bytes
    limit = int(capacity * (1 - margin_frac))
    if used > capacity:
        return (
            f"{found.peak.name} needs {format_bytes(used)} of {format_bytes(capacity)}: "
            f"{format_bytes(used - capacity)} too many"
        )
    if used > limit:
        return (
            f"{found.peak.name} needs {format_bytes(used)} of {format_bytes(capacity)}: "
            f"{format_bytes(used - limit)} into the margin of {margin_frac:.0%}"
        )
    return (
        f"the host needs {format_bytes(found.host_bytes_per_node)} of "
        f"{format_bytes(found.host_capacity_bytes or 0)} per node"
    )
