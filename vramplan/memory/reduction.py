"""ZeRO-3's bucket of gradients: when it is reduced, and what the reduction copies."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True, slots=True)
class Bucket:
    """The bucket's elements and the ranks that a reduction is scattered over."""

    numel: int
    degree: int


@dataclass(frozen=True, slots=True)
class BucketFlush:
    """One reduction; it happens when gradient ``before`` arrives (None: after the last)."""

    before: int | None
    copied: int
    """Elements of the flat copy that is scattered."""
    oversized: int
    """Elements of gradients that are larger than the bucket and wait outside it."""
    largest: int
    """Elements of the largest gradient."""


@lru_cache(maxsize=1024)
def bucket_flushes(gradients: tuple[tuple[str, int], ...], bucket: Bucket) -> tuple[BucketFlush, ...]:
    """Reductions of gradients ``(name, numel)`` in their order of arrival.

    Source: stage3.py, ``reduce_independent_p_g_buckets_and_remove_grads``; coalesced_collectives.py,
    ``reduce_scatter_coalesced``: a lone tensor that divides by the ranks is scattered where it is.
    """
    done: list[BucketFlush] = []
    held: list[int] = []
    for position, (_, numel) in enumerate(gradients):
        if held and sum(held) + numel > bucket.numel:
            done.append(_flush(held, position, bucket))
            held = []
        held.append(numel)
    if held:
        done.append(_flush(held, None, bucket))
    return tuple(done)


def _flush(held: list[int], before: int | None, bucket: Bucket) -> BucketFlush:
    lone = len(held) == 1 and held[0] % bucket.degree == 0
    oversized = sum(numel for numel in held if numel > bucket.numel)
    return BucketFlush(before, 0 if lone else sum(held), oversized, max(held))
