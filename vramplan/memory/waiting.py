"""Gradients that are larger than the reduction bucket and wait beside it (deepspeed 0.19.8, stage_1_and_2.py).

One bypasses the bucket and stays ``param.grad`` until the bucket's next gradient arrives
(``extra_large_param_to_reduce``). Gradients of another communication format have a bucket of their own, so that several
can wait at a time, and reductions of one bucket go on while another's waits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from vramplan.memory.micro_batch import Gradient
from vramplan.memory.partition import Flush

History = list[tuple[int, dict[str, int]]]
"""From which instant on reductions have left what."""


@dataclass(frozen=True, slots=True)
class Wait:
    """From the instant ``start`` until ``stop``; no bytes where the flush is not of a large gradient."""

    start: int
    stop: int
    num_bytes: int


def waits_of(flushes: Sequence[Flush], gradients: Sequence[Gradient], limit: int, width: int, last: int) -> list[Wait]:
    """Of each flush, the wait of its large gradient. ``gradients``: as they arrive; ``limit``: elements of the bucket;
    ``width``: bytes an element; ``last``: the instant after backward."""
    arrivals = {each.name: each.at.index for each in gradients}
    return [
        Wait(
            arrivals[flush.held[0]],
            last if flush.before is None else gradients[flush.before].at.index,
            flush.numel * width if flush.numel > limit else 0,
        )
        for flush in flushes
    ]


def waiting_meanwhile(waits: Sequence[Wait], instant: int) -> int:
    """Bytes of large gradients that had come before an instant, of those that are reduced later."""
    return sum(wait.num_bytes for wait in waits if wait.start < instant)


def left_at(history: History, instant: int) -> dict[str, int]:
    """What reductions have left by an instant."""
    *_, left = (left for start, left in history if start <= instant)
    return left


def stretches(history: History, waits: Sequence[Wait], last: int) -> Iterator[tuple[int, int, dict[str, int], int]]:
    """Stretches of backward in which large gradients wait: (from, until, what reductions have left, bytes waiting)."""
    edges = {last, *(start for start, _ in history), *(edge for wait in waits for edge in (wait.start, wait.stop))}
    for since, end in pairwise(sorted(edge for edge in edges if edge <= last)):
        num_bytes = sum(wait.num_bytes for wait in waits if wait.start <= since < wait.stop)
        if num_bytes:
            yield since, end, left_at(history, since), num_bytes
