"""The candidates that a search tried: each is estimated once, and only where a cheaper bound leaves room for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import overload

from vramplan.facts.architecture import Architecture
from vramplan.facts.device import Node
from vramplan.memory.estimate import UncoveredError, check_covered, estimate_run
from vramplan.memory.floor import floor_bytes
from vramplan.memory.from_run import job_from_run
from vramplan.memory.ledger import Estimate
from vramplan.memory.overhead import overhead
from vramplan.search.plan import Refusal
from vramplan.search.price import Priced
from vramplan.search.room import fits_with_margin, limit_bytes, shortfall, why_not
from vramplan.search.space import Candidate
from vramplan.spec.run import RunSpec


class Trials:
    """Estimates of the candidates that were tried, each worked out once."""

    def __init__(self, node: Node, architecture: Architecture, excluded: Mapping[Candidate, str]) -> None:
        self.node = node
        self.excluded = excluded
        self.architecture = architecture
        self._results: dict[Candidate, Estimate | UncoveredError] = {}
        self._floors: dict[Candidate, int] = {}

    def fits(self, each: Priced, margin_frac: float) -> bool:
        if self._floor(each) > limit_bytes(self.node.capacity_bytes, margin_frac):
            return False
        result = self._try(each)
        return isinstance(result, Estimate) and fits_with_margin(result, margin_frac)

    def estimate_of(self, each: Priced) -> Estimate:
        result = self._try(each)
        if isinstance(result, UncoveredError):
            raise result
        return result

    def leanest(self, ranked: Sequence[Priced]) -> Priced:
        """The candidate with the fewest bytes; raises UncoveredError where none is covered."""
        best: tuple[tuple[bool, bool, int, int], int] | None = None
        for position in sorted(range(len(ranked)), key=lambda each: self._floor(ranked[each])):
            if best is not None and (False, False, 0, self._floor(ranked[position])) > best[0]:
                break  # the bounds of the rest are no lower
            result = self._try(ranked[position])
            if isinstance(result, Estimate):
                found = shortfall(result), position
                best = found if best is None else min(best, found)
        if best is None:
            result = self._try(ranked[0])
            assert isinstance(result, UncoveredError)
            raise result
        return ranked[best[1]]

    def uncovered(self) -> tuple[str, ...]:
        """Why candidates that were looked at are not counted, each reason once."""
        counted_out = (
            str(result)
            for candidate, result in self._results.items()
            if isinstance(result, UncoveredError) and candidate not in self.excluded
        )
        return tuple(dict.fromkeys(counted_out))

    def refusals(self, better: Iterable[Priced], margin_frac: float) -> Sequence[Refusal]:
        """Why each of ``better`` was not taken; those that fit were as good as the choice, and are not refused."""
        unfit = [each for each in better if not self.fits(each, margin_frac)]
        return _Refusals(len(unfit), lambda: tuple(_refuse(each, self._try(each), margin_frac) for each in unfit))

    def _floor(self, each: Priced) -> int:
        """Used bytes of a candidate, or fewer; 0 where they are not counted."""
        if each.candidate not in self._floors:
            self._floors[each.candidate] = self._used_floor(each)
        return self._floors[each.candidate]

    def _used_floor(self, each: Priced) -> int:
        if each.candidate in self.excluded:
            return 0
        try:
            return used_floor(each.run, self.node, self.architecture)
        except UncoveredError as error:
            self._results[each.candidate] = error
            return 0

    def _try(self, each: Priced) -> Estimate | UncoveredError:
        if each.candidate not in self._results:
            result: Estimate | UncoveredError
            try:
                if each.candidate in self.excluded:
                    raise UncoveredError(self.excluded[each.candidate])
                # one rank that does not fit is enough; only what may fit is worth asking every rank about
                result = estimate_run(each.run, self.node, self.architecture, rank=0)
                if result.fits and each.run.zero.stage in (1, 2):
                    result = estimate_run(each.run, self.node, self.architecture)
            except UncoveredError as error:
                result = error
            self._results[each.candidate] = result
        return self._results[each.candidate]


def used_floor(run: RunSpec, node: Node, architecture: Architecture) -> int:
    """Bytes that any rank of a closed run uses at the highest moment, or fewer.

    Raises:
        UncoveredError: the arithmetic does not cover the run.
    """
    job = job_from_run(run, node, architecture)
    check_covered(job)
    allocated = floor_bytes(job)
    beyond = overhead(node, job.layout, run.alloc_conf, allocated)
    return allocated + sum(term.num_bytes for term in beyond.terms)


class _Refusals(Sequence[Refusal]):
    """Refusals with their numbers, which are worked out when the first is asked for."""

    def __init__(self, count: int, make: Callable[[], tuple[Refusal, ...]]) -> None:
        self._count = count
        self._make = make

    @cached_property
    def _every(self) -> tuple[Refusal, ...]:
        return self._make()

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Refusal: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Refusal, ...]: ...
    def __getitem__(self, index: int | slice) -> Refusal | tuple[Refusal, ...]:
        return self._every[index]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and tuple(self) == tuple(other)

    def __hash__(self) -> int:
        return hash(self._every)

    def __repr__(self) -> str:
        return repr(self._every)

    def __reduce__(self) -> tuple[type[tuple[Refusal, ...]], tuple[tuple[Refusal, ...]]]:
        return tuple, (self._every,)  # copied and pickled as what they are


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
