"""The rows that every form of a report shows: the ledger of the peak, the moments, the candidates refused."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from vramplan.memory.ledger import Estimate
from vramplan.memory.term import Basis, Term
from vramplan.search.plan import Refusal
from vramplan.search.space import Candidate

SMALL_FRAC = 0.001
"""Terms below this share of the peak are shown as one row."""


@dataclass(frozen=True, slots=True)
class LedgerRow:
    """One line of the ledger."""

    name: str
    num_bytes: int
    share: float
    """Of the used bytes."""
    basis: Basis | None = None
    note: str = ""
    is_total: bool = False


def ledger_rows(found: Estimate) -> list[LedgerRow]:
    """Terms of the peak, largest first, then their sum, what the driver counts on top, and all that is used."""
    used = found.used_peak_bytes
    rows = _term_rows(found.peak.terms, used)
    rows.append(_total("allocated by tensors", found.allocated_peak_bytes, used))
    if found.overhead:
        rows += _term_rows(found.overhead, used)
        rows.append(_total("used, as the driver counts", used, used))
    return rows


def disk_rows(found: Estimate) -> list[LedgerRow]:
    """What one rank keeps in files; empty without offload to NVMe."""
    total = sum(term.num_bytes for term in found.disk_terms)
    return [*_term_rows(found.disk_terms, total), _total("files of one rank", total, total)] if total else []


def host_rows(found: Estimate) -> list[LedgerRow]:
    """Host terms of one rank, then their sum; empty where nothing lives there."""
    total = sum(term.num_bytes for term in found.host_terms)
    return [*_term_rows(found.host_terms, total), _total("host memory of one rank", total, total)] if total else []


def moment_rows(found: Estimate) -> list[LedgerRow]:
    """Every moment with its allocated bytes, in the order in which a run passes them."""
    highest = max(moment.num_bytes for moment in found.moments)
    return [
        LedgerRow(
            moment.name,
            moment.num_bytes,
            moment.num_bytes / highest if highest else 0.0,
            note=moment.phase.value,
            is_total=moment is found.peak,
        )
        for moment in found.moments
    ]


def nearest_refusals(refused: Iterable[Refusal]) -> list[Refusal]:
    """Of refused candidates that differ in their micro-batch only, the smallest: larger ones need more still."""
    nearest: dict[Candidate, Refusal] = {}
    for refusal in refused:
        layout = replace(refusal.candidate, micro_batch_size=0, grad_accum_steps=0)
        known = nearest.get(layout)
        if known is None or refusal.candidate.micro_batch_size < known.candidate.micro_batch_size:
            nearest[layout] = refusal
    return list(nearest.values())


def _term_rows(terms: Iterable[Term], whole: int) -> list[LedgerRow]:
    ordered = sorted((term for term in terms if term.num_bytes), key=lambda term: -term.num_bytes)
    shown = [term for term in ordered if term.num_bytes >= whole * SMALL_FRAC]
    small = ordered[len(shown) :]
    if len(small) == 1:
        shown, small = ordered, []
    rows = [
        LedgerRow(term.name, term.num_bytes, _share(term.num_bytes, whole), term.basis, term.note) for term in shown
    ]
    if small:
        rest = sum(term.num_bytes for term in small)
        names = ", ".join(term.name for term in small)
        rows.append(LedgerRow(f"{len(small)} smaller terms", rest, _share(rest, whole), note=names))
    return rows


def _total(name: str, num_bytes: int, whole: int) -> LedgerRow:
    return LedgerRow(name, num_bytes, _share(num_bytes, whole), is_total=True)


def _share(num_bytes: int, whole: int) -> float:
    return num_bytes / whole if whole else 0.0
