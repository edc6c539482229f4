"""The search: of all legal candidates the fastest that fits, and why every better-looking one was refused."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from vramplan.errors import NoPlanError
from vramplan.facts.architecture import Architecture
from vramplan.facts.device import Node
from vramplan.memory.estimate import UncoveredError, estimate
from vramplan.memory.ledger import Estimate
from vramplan.search.legality import with_usual_attention
from vramplan.search.plan import Refusal
from vramplan.search.price import TIE_FRAC, Priced, priced
from vramplan.search.room import MARGIN_FRAC, fits_with_margin, shortfall, why_not
from vramplan.search.space import Candidate
from vramplan.spec.run import RunSpec


@dataclass(frozen=True, slots=True)
class Answer:
    """What a search found."""

    best: Priced
    """The candidate chosen; where none fits, the one with the fewest bytes."""
    fits: bool
    estimate: Estimate
    """Of ``best``."""
    refused: tuple[Refusal, ...]
    margin_frac: float
    """0 where only a candidate without any margin fits."""


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
        LegalityError: DeepSpeed refuses every one.
        UncoveredError: the arithmetic covers none.
    """
    check_sequence_length(run, architecture)
    run = with_usual_attention(run, architecture)
    ranked = sorted(priced(run, node, architecture), key=lambda each: (each.seconds_per_sequence, each.complexity))
    trials = _Trials(node, architecture, excluded)
    for margin in (margin_frac, 0.0):
        chosen = _choose(ranked, trials, margin)
        if chosen is not None:
            better = [each for each in ranked if each.looks_better_than(chosen)]
            return Answer(chosen, True, trials.estimate_of(chosen), trials.refusals(better, margin), margin)
    leanest = trials.leanest()
    return Answer(leanest, False, trials.estimate_of(leanest), trials.refusals(ranked, margin_frac), margin_frac)


def _choose(ranked: Sequence[Priced], trials: _Trials, margin_frac: float) -> Priced | None:
    fastest = next((each for each in ranked if trials.fits(each, margin_frac)), None)
    if fastest is None:
        return None
    limit = fastest.seconds_per_sequence * (1 + TIE_FRAC)
    about_as_fast = (each for each in ranked if each.seconds_per_sequence <= limit)
    simplest_first = sorted(about_as_fast, key=lambda each: (each.complexity, each.seconds_per_sequence))
    return next(each for each in simplest_first if trials.fits(each, margin_frac))


class _Trials:
    """Estimates of the candidates that were tried, each worked out once."""

    def __init__(self, node: Node, architecture: Architecture, excluded: Mapping[Candidate, str]) -> None:
        self.node = node
        self.excluded = excluded
        self.architecture = architecture
        self.results: dict[Candidate, tuple[Priced, Estimate | UncoveredError]] = {}

    def fits(self, each: Priced, margin_frac: float) -> bool:
        result = self._try(each)
        return isinstance(result, Estimate) and fits_with_margin(result, margin_frac)

    def estimate_of(self, each: Priced) -> Estimate:
        result = self._try(each)
        if isinstance(result, UncoveredError):
            raise result
        return result

    def leanest(self) -> Priced:
        """The candidate with the fewest bytes; raises UncoveredError where none is covered."""
        covered = [each for each, result in self.results.values() if isinstance(result, Estimate)]
        if not covered:
            _, result = next(iter(self.results.values()))
            assert isinstance(result, UncoveredError)
            raise result
        return min(covered, key=lambda each: shortfall(self.estimate_of(each)))

    def refusals(self, better: Iterable[Priced], margin_frac: float) -> tuple[Refusal, ...]:
        """Why each of ``better`` was not taken; those that fit were as good as the choice, and are not refused."""
        return tuple(_refuse(each, self._try(each), margin_frac) for each in better if not self.fits(each, margin_frac))

    def _try(self, each: Priced) -> Estimate | UncoveredError:
        if each.candidate not in self.results:
            result: Estimate | UncoveredError
            try:
                if each.candidate in self.excluded:
                    raise UncoveredError(self.excluded[each.candidate])
                # one rank that does not fit is enough; only what may fit is worth asking every rank about
                result = estimate(each.run, self.node, self.architecture, rank=0)
                if result.fits and each.run.zero.stage in (1, 2):
                    result = estimate(each.run, self.node, self.architecture)
            except UncoveredError as error:
                result = error
            self.results[each.candidate] = each, result
        return self.results[each.candidate][1]


def check_sequence_length(run: RunSpec, architecture: Architecture) -> None:
    """Raises NoPlanError where the model has fewer positions than a sequence has tokens."""
    if 0 < architecture.max_positions < run.seq_len:
        raise NoPlanError(
            f"seq_len {run.seq_len} is longer than the {architecture.max_positions} positions of {run.model}: "
            f"set seq_len to {architecture.max_positions} or less"
        )


def _refuse(each: Priced, result: Estimate | UncoveredError, margin_frac: float) -> Refusal:
    tokens_per_s = each.run.seq_len / each.seconds_per_sequence
    if isinstance(result, UncoveredError):
        return Refusal(each.candidate, str(result), each.step_time_s, tokens_per_s)
    return Refusal(
        candidate=each.candidate,
        reason=why_not(result, margin_frac),
        step_time_s=each.step_time_s,
        tokens_per_s=tokens_per_s,
        used_peak_bytes=result.used_peak_bytes,
        peak_moment=result.peak.name,
    )
