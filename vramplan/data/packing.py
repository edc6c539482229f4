"""Best-fit packing: several documents in one sequence, none cut (Ding et al. 2024, arXiv:2404.10830)."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from vramplan.data.sample import Sample


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Bins of indices into ``lengths``, each of at most ``capacity`` in all: longest first, each into the fullest bin
    that still has room for it. O(n (log n + capacity)), and the same on every machine."""
    bins: list[list[int]] = []
    by_room: dict[int, list[int]] = {}
    rooms: list[int] = []  # sorted, those with a bin
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        length = lengths[index]
        at = bisect_left(rooms, length)
        if at < len(rooms):
            room = rooms[at]
            chosen = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[at]
        else:
            room, chosen = capacity, len(bins)
            bins.append([])
        bins[chosen].append(index)
        left = room - length
        if left:
            if left not in by_room:
                insort(rooms, left)
            by_room.setdefault(left, []).append(chosen)
    return bins


def pack(samples: Sequence[Sample], seq_len: int) -> list[Sample]:
    """The samples as packs of at most ``seq_len`` tokens, in the order of each pack's first row."""
    bins = best_fit([sample.num_tokens for sample in samples], seq_len)
    ordered = sorted(sorted(members) for members in bins)
    return [_joined([samples[index] for index in members]) for members in ordered]


def _joined(samples: list[Sample]) -> Sample:
    """One sequence; the first token of a document is no target, for nothing of its own precedes it."""
    trained = [sample.trained.copy() for sample in samples]
    for mask in trained:
        mask[0] = False
    first, others = samples[0], len(samples) - 1
    return replace(
        first,
        where=f"{first.where} (packed with {others} more)" if others else first.where,
        ids=np.concatenate([sample.ids for sample in samples]),
        trained=np.concatenate(trained),
        num_cut=sum(sample.num_cut for sample in samples),
        weight=1.0,
        doc_lengths=tuple(sample.num_tokens for sample in samples),
        doc_weights=tuple(sample.weight for sample in samples),
    )
