"""Collectives that return only when their backend's thread holds none of their tensors any more.

Gloo's worker thread wakes who waits for a collective before it lets go of its tensors (ProcessGroupGloo.cpp,
``runLoop``: ``finish`` first, then the last reference to the work). Where the caller drops such a tensor in that
moment, the worker frees it; and what another thread frees the CPU's profiler does not see, so that the block seems to
live on until its address is handed out again.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist

_COLLECTIVES = ("all_reduce", "reduce", "broadcast", "all_gather", "reduce_scatter", "all_to_all_single")
"""What DeepSpeed calls by its name in ``torch.distributed`` (comm/torch.py)."""
_PATIENCE_S = 0.05


class SettledCollectives:
    """While installed, blocking collectives of ``torch.distributed`` wait for their backend to let go."""

    def __init__(self) -> None:
        self._originals: dict[str, Any] = {}

    def install(self) -> None:
        if not self._originals and dist.is_available():
            self._originals = {name: getattr(dist, name) for name in _COLLECTIVES}
            for name, collective in self._originals.items():
                setattr(dist, name, _settled(collective))

    def remove(self) -> None:
        for name, collective in self._originals.items():
            setattr(dist, name, collective)
        self._originals = {}


def _settled(collective: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(collective)
    def call(*args: Any, **kwargs: Any) -> Any:
        before = [(tensor, tensor._use_count()) for tensor in _tensors((*args, *kwargs.values()))]  # type: ignore[attr-defined]
        work = collective(*args, **kwargs)
        if work is None:  # a handle's own wait is the caller's
            until = time.monotonic() + _PATIENCE_S
            while any(tensor._use_count() > count for tensor, count in before) and time.monotonic() < until:  # type: ignore[attr-defined]
                time.sleep(0)
        return work

    return call


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)
