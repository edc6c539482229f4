"""Gradients that are larger than the reduction bucket and wait beside it (deepspeed 0.19.8, runtime/zero).

One bypasses the bucket and stays ``param.grad`` until the bucket's next gradient arrives (stage_1_and_2.py,
``extra_large_param_to_reduce``; stage3.py, ``__add_grad_to_ipg_bucket``). Gradients of another communication format
have a bucket of their own, so that several can wait at a time, and reductions of one bucket go on while another's
waits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from vramplan.memory.micro_batch import Profile
from vramplan.memory.partition import Flush

History = list[tuple[int, dict[str, int]]]
"""From the arrival of which gradient on (its place in their order) reductions have left what."""


@dataclass(frozen=True, slots=True)
class Wait:
    """From the arrival of the gradient at place ``start`` until that at ``stop``; no bytes where the flush is not of a
    large gradient. Places and not instants: layers of one kind are run once, and share their instants."""

    start: int
    stop: int
    num_bytes: int


def waits_of(flushes: Sequence[Flush], names: Sequence[str], limit: int, width: int) -> list[Wait]:
    """Of each flush, the wait of its large gradient. ``names``: of gradients as they arrive; ``limit``: elements of the
    bucket; ``width``: bytes an element."""
    places = {name: place for place, name in enumerate(names)}
    return [
        Wait(
            places[flush.held[0]],
            len(names) if flush.before is None else flush.before,
            flush.numel * width if flush.numel > limit else 0,
        )
        for flush in flushes
    ]


def waiting_meanwhile(waits: Sequence[Wait], place: int) -> int:
    """Bytes of large gradients that had come before the gradient at a place, of those that are reduced later."""
    return sum(wait.num_bytes for wait in waits if wait.start < place)


def left_at(history: History, place: int) -> dict[str, int]:
    """What reductions have left as the gradient at a place arrives."""
    *_, left = (left for start, left in history if start <= place)
    return left


def stretches(
    history: History, waits: Sequence[Wait], profile: Profile
) -> Iterator[tuple[int, int, dict[str, int], int]]:
    """Stretches of backward in which large gradients wait: (from instant, until instant, what reductions have left,
    bytes waiting), each once.

    A layer that is not run shares the instants of one that comes earlier in backward, where more activations live: its
    waits are seen at the layers that are run.
    """
    instants = [*(each.at.index for each in profile.gradients), len(profile.backward)]
    changes, seen = [0] * len(instants), set[tuple[int, int, int, int]]()
    for wait in waits:
        changes[wait.start] += wait.num_bytes
        changes[wait.stop] -= wait.num_bytes
    highest = 0
    for place, num_bytes in enumerate(accumulate(changes[:-1])):
        since, end = instants[place], instants[place + 1]
        if since < highest:
            continue
        highest = since
        if num_bytes and since < end:
            left = left_at(history, place)
            if (kind := (since, end, id(left), num_bytes)) not in seen:
                seen.add(kind)
                yield since, end, left, num_bytes
