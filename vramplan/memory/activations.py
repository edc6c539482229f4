"""The instants of forward and backward that can be a peak, for one way of keeping gradients.

A tape has hundreds of instants; one that is nowhere higher than another, whatever the batch, cannot be the peak.
"""

from __future__ import annotations

from functools import lru_cache

from vramplan.memory.model_run import ModelRun
from vramplan.memory.profile import Profile, profile
from vramplan.memory.size import Size, add, const, dominates
from vramplan.memory.tape import Point


def undominated(points: list[tuple[Size, Point]]) -> tuple[tuple[Size, Point], ...]:
    """The instants that can be highest for some batch: none of the rest is at least as high for every batch."""
    kept: list[tuple[Size, Point]] = []
    for size, point in sorted(points, key=lambda each: -sum(each[0])):
        if not any(dominates(other, size) for other, _ in kept):
            kept.append((size, point))
    return tuple(kept)


@lru_cache(maxsize=512)
def forward_candidates(run: ModelRun) -> tuple[tuple[Size, Point], ...]:
    """Instants of forward that can be its highest."""
    return undominated([(point.total, point) for point in profile(run).forward])


@lru_cache(maxsize=512)
def backward_candidates(
    run: ModelRun, grad_width: int
) -> tuple[tuple[tuple[Size, Point], ...], tuple[tuple[Size, Point], ...]]:
    """Instants before and after the first parameter gradient is there; where gradients are moved away, the instant at
    which it is delivered is one of the latter: the bucket is made then (stage_1_and_2.py, ``setup_buckets``).

    ``grad_width``: bytes an element of gradients that stay (``param.grad``); 0 where they are moved away at once.
    """
    found = profile(run)
    first = first_gradient_index(found)
    early: list[tuple[Size, Point]] = []
    late: list[tuple[Size, Point]] = []
    for point in found.backward:
        size = add(point.total, const(grad_width * point.grad_numel))
        (early if point.index < first else late).append((size, point))
    if found.gradients and grad_width <= 0:
        at = found.gradients[0].at
        late.append((add(at.total, const(grad_width * at.grad_numel)), at))
    return undominated(early), undominated(late)


def first_gradient_index(found: Profile) -> int:
    """How many allocations of backward come before the first parameter gradient is delivered."""
    return found.gradients[0].at.index if found.gradients else len(found.backward)
