"""Which rows are held out for evaluation. Raw text is held out by whole documents: pieces of one that is trained on
would look better known than new text is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from vramplan.data.row import Text
from vramplan.data.sample import Sample
from vramplan.data.sampler import permutation
from vramplan.data.store import Picked
from vramplan.data.tables import iter_rows
from vramplan.errors import DataError
from vramplan.spec.data import SourceSpec

_HOLDOUT_EPOCH = 2**31
"""An epoch number that no training reaches: the held-out part is drawn from a stream of its own."""


def split(
    samples: Sequence[Sample], eval_frac: float, seed: int, key: str = "data.eval_frac"
) -> tuple[Sequence[Sample], Sequence[Sample]]:
    """(training, held-out) samples: ``eval_frac`` of them (``key`` in errors), at least one, drawn by the seed; both
    keep their order.

    Raises:
        DataError: nothing would be left to train on.
    """
    if eval_frac == 0:
        return samples, ()
    num_held_out = max(1, round(eval_frac * len(samples)))
    if num_held_out >= len(samples):
        raise DataError(f"{key} {eval_frac} holds out all of {len(samples)} samples: lower it, or give more rows")
    chosen = set(permutation(seed, _HOLDOUT_EPOCH, len(samples))[:num_held_out].tolist())
    kept = [index for index in range(len(samples)) if index not in chosen]
    return Picked(samples, kept), Picked(samples, sorted(chosen))


def documents(source: SourceSpec) -> Iterator[Text]:
    """The rows of a source of raw text; of one of another kind none, and only its first row is read.

    Raises:
        DataError: as ``iter_rows``.
    """
    for row in iter_rows(source):
        if not isinstance(row, Text):
            return
        yield row


def held_out_documents(
    sizes: Sequence[int], eval_frac: float, seed: int, key: str = "data.eval_frac"
) -> frozenset[int]:
    """Numbers of the documents (of ``sizes`` characters) that are held out. In an order drawn by the seed each is taken
    that brings their characters nearer to ``eval_frac`` of all, so that one long document is not held out for a small
    share; if that is none, the shortest is.

    Raises:
        DataError: nothing would be left to train on.
    """
    wanted, held, chosen = eval_frac * sum(sizes), 0, set[int]()
    order = [int(number) for number in permutation(seed, _HOLDOUT_EPOCH, len(sizes))]
    for number in order:
        if held + sizes[number] / 2 <= wanted:
            chosen.add(number)
            held += sizes[number]
    if len(chosen) == len(sizes):
        raise DataError(f"{key} {eval_frac} holds out all of {len(sizes)} documents: lower it, or give more of them")
    return frozenset(chosen or {min(order, key=sizes.__getitem__)})
