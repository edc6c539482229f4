"""The search: of all legal candidates the fastest that fits, and why every better-looking one was refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from vramplan.errors import NoPlanError
from vramplan.facts.architecture import Architecture
from vramplan.facts.device import Node
from vramplan.memory.ledger import Estimate
from vramplan.search.legality import with_usual_attention
from vramplan.search.plan import Refusal
from vramplan.search.price import TIE_FRAC, Priced, priced
from vramplan.search.room import MARGIN_FRAC
from vramplan.search.space import Candidate
from vramplan.search.trials import Trials
from vramplan.spec.check import check_run
from vramplan.spec.run import RunSpec


@dataclass(frozen=True, slots=True)
class Answer:
    """What a search found."""

    best: Priced
    """The candidate chosen; where none fits, the one with the fewest bytes."""
    fits: bool
    estimate: Estimate
    """Of ``best``."""
    refused: Sequence[Refusal]
    margin_frac: float
    """0 where only a candidate without any margin fits."""
    uncovered: tuple[str, ...] = ()
    """Why candidates were passed over whose bytes are not counted, where none fits."""


def search(
    run: RunSpec,
    node: Node,
    architecture: Architecture,
    margin_frac: float = MARGIN_FRAC,
    excluded: Mapping[Candidate, str] = MappingProxyType({}),
) -> Answer:
    """The simplest of the candidates that fit and are about as fast as the fastest of them.

    Candidates are tried from the fastest on. Where none fits with the margin, one that fits without is taken; one whose
    bytes the arithmetic does not cover is passed over, with that as the reason. ``excluded``: candidates that another
    witness refused, with its reason.

    Raises:
        NoPlanError: no candidate can be made; the text says which number to change.
        LegalityError: DeepSpeed refuses every one, or methods do not go together.
        SpecError: the run watches a held-out set that it does not have.
        UncoveredError: the arithmetic covers none.
    """
    check_run(run)
    check_sequence_length(run, architecture)
    run = with_usual_attention(run, architecture)
    ranked = sorted(priced(run, node, architecture), key=lambda each: (each.seconds_per_sequence, each.complexity))
    trials = Trials(node, architecture, excluded)
    for margin in (margin_frac, 0.0):
        chosen = _choose(ranked, trials, margin)
        if chosen is not None:
            better = [each for each in ranked if each.looks_better_than(chosen)]
            return Answer(chosen, True, trials.estimate_of(chosen), trials.refusals(better, margin), margin)
    leanest = trials.leanest(ranked)
    refused = trials.refusals(ranked, margin_frac)
    return Answer(leanest, False, trials.estimate_of(leanest), refused, margin_frac, trials.uncovered())


def _choose(ranked: Sequence[Priced], trials: Trials, margin_frac: float) -> Priced | None:
    fastest = next((each for each in ranked if trials.fits(each, margin_frac)), None)
    if fastest is None:
        return None
    limit = fastest.seconds_per_sequence * (1 + TIE_FRAC)
    about_as_fast = (each for each in ranked if each.seconds_per_sequence <= limit)
    simplest_first = sorted(about_as_fast, key=lambda each: (each.complexity, each.seconds_per_sequence))
    return next(each for each in simplest_first if trials.fits(each, margin_frac))


def check_sequence_length(run: RunSpec, architecture: Architecture) -> None:
    """Raises NoPlanError where the model has fewer positions than a sequence has tokens."""
    if 0 < architecture.max_positions < run.seq_len:
        raise NoPlanError(
            f"seq_len {run.seq_len} is longer than the {architecture.max_positions} positions of {run.model}: "
            f"set seq_len to {architecture.max_positions} or less"
        )
