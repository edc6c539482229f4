"""ZeRO-3's bucket of gradients: when it is reduced, and what the reduction copies; and the optimizer's sub-groups."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from vramplan.memory.parameters import Groups
from vramplan.spec.layout import shard


def sub_groups(groups: Groups, degree: int, least_numel: int) -> Groups:
    """The sub-groups that are stepped one after the other: parameters of a group are laid together until a rank's parts
    have ``least_numel`` elements (stage3.py, ``_create_fp16_sub_groups``)."""
    found: list[tuple[tuple[str, int], ...]] = []
    for group in groups:
        together: list[tuple[str, int]] = []
        share = 0
        for name, numel in group:
            together.append((name, numel))
            share += shard(numel, degree)
            if share >= least_numel:
                found.append(tuple(together))
                together, share = [], 0
        found += [tuple(together)] if together else []
    return tuple(found)


@dataclass(frozen=True, slots=True)
class Bucket:
    """The bucket's elements and the ranks that a reduction is scattered over."""

    numel: int
    degree: int


@dataclass(frozen=True, slots=True)
class BucketFlush:
    """One reduction; it happens when gradient ``before`` arrives (None: after the last)."""

    last: int
    """The gradient that came into the bucket last."""
    before: int | None
    numel: int
    """Elements of its gradients."""
    copied: int
    """Elements of the flat copy that is scattered."""
    parts: int
    """Elements of one rank's parts of the gradients."""
    oversized: int
    """Elements of a gradient that is larger than the bucket and waits outside it."""
    largest: int
    """Elements of the largest gradient."""
    lowered: bool
    """Whether the gradients travel in autocast's format."""


@lru_cache(maxsize=1024)
def bucket_flushes(
    gradients: tuple[tuple[str, int], ...], bucket: Bucket, lowered: frozenset[str] = frozenset()
) -> tuple[BucketFlush, ...]:
    """Reductions of gradients ``(name, numel)`` in their order of arrival; those in ``lowered`` have a bucket of their
    own.

    Source: stage3.py, ``reduce_independent_p_g_buckets_and_remove_grads``; coalesced_collectives.py,
    ``reduce_scatter_coalesced``: a lone tensor that divides by the ranks is scattered where it is.
    """
    done: list[BucketFlush] = []
    buckets: dict[bool, list[tuple[int, int]]] = {}
    filled: dict[bool, int] = {}
    for position, (name, numel) in enumerate(gradients):
        kind = name in lowered
        held = buckets.setdefault(kind, [])
        if held and filled[kind] + numel > bucket.numel:
            done.append(_flush(held, position, bucket, kind))
            held.clear()
        held.append((position, numel))
        filled[kind] = numel if len(held) == 1 else filled[kind] + numel
    done += [_flush(held, None, bucket, kind) for kind, held in buckets.items()]
    return tuple(done)


def _flush(held: list[tuple[int, int]], before: int | None, bucket: Bucket, lowered: bool) -> BucketFlush:
    numels = [numel for _, numel in held]
    lone = len(numels) == 1 and numels[0] % bucket.degree == 0
    return BucketFlush(
        last=held[-1][0],
        before=before,
        numel=sum(numels),
        copied=0 if lone else sum(numels),
        parts=sum(shard(numel, bucket.degree) for numel in numels),
        oversized=sum(numel for numel in numels if numel > bucket.numel),
        largest=max(numels),
        lowered=lowered,
    )
