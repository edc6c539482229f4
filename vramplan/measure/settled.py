"""Collectives that return only when their backend's thread holds none of their tensors any more.

Gloo's worker thread wakes who waits for a collective before it lets go of its tensors (ProcessGroupGloo.cpp,
``runLoop``: ``finish`` first, then the last reference to the work). Where the caller drops such a tensor in that
moment, the worker frees it; and what another thread frees the CPU's profiler does not see, so that the block seems to
live on until its address is handed out again.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist

_COLLECTIVES = ("all_reduce", "reduce", "broadcast", "all_gather", "reduce_scatter", "all_to_all_single")
"""What DeepSpeed calls by its name in ``torch.distributed`` (comm/torch.py)."""
_KEPT_BY_DEEPSPEED = ("all_gather_function", "reduce_scatter_function")
"""What its backend looked up as it was made (comm/torch.py, ``TorchBackend.__init__``)."""
_PATIENCE_S = 0.05


class SettledCollectives:
    """While installed, whoever waits for a collective of ``torch.distributed`` waits for its backend to let go too."""

    def __init__(self) -> None:
        self._originals: list[tuple[Any, str, Any]] = []

    def install(self) -> None:
        """Again, it takes in the backend that DeepSpeed has made since."""
        known = {(id(owner), name) for owner, name, _ in self._originals}
        for owner, name in _owners():
            original = getattr(owner, name, None)
            if original is not None and (id(owner), name) not in known:
                self._originals.append((owner, name, original))
                setattr(owner, name, _settled(original))

    def remove(self) -> None:
        for owner, name, original in self._originals:
            setattr(owner, name, original)
        self._originals = []


def _owners() -> Iterator[tuple[Any, str]]:
    if not dist.is_available():
        return
    yield from ((dist, name) for name in _COLLECTIVES)
    deepspeed = sys.modules.get("deepspeed.comm.comm")
    if deepspeed is not None and deepspeed.cdb is not None:
        yield from ((deepspeed.cdb, name) for name in _KEPT_BY_DEEPSPEED)


def _settled(collective: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(collective)
    def call(*args: Any, **kwargs: Any) -> Any:
        before = [(tensor, _holders(tensor)) for tensor in _tensors((*args, *kwargs.values()))]
        work = collective(*args, **kwargs)
        if work is not None:
            return _SettledWork(work, before)
        _wait_until_let_go(before)
        return None

    return call


class _SettledWork:
    """A handle. Like the work itself it keeps its tensors until it is dropped."""

    def __init__(self, work: Any, before: list[tuple[torch.Tensor, int]]) -> None:
        self._work = work
        self._before = before

    def wait(self, *args: Any) -> Any:
        if self._work is None:
            return True
        found = self._work.wait(*args)
        self._work = None  # which holds the tensors as the backend's thread does
        _wait_until_let_go(self._before)
        return found

    def is_completed(self) -> bool:
        return self._work is None or bool(self._work.is_completed())

    def __getattr__(self, name: str) -> Any:
        if self._work is None:
            raise AttributeError(f"{name}: the collective has been waited for, and let go of")
        return getattr(self._work, name)


def _wait_until_let_go(before: list[tuple[torch.Tensor, int]]) -> None:
    until = time.monotonic() + _PATIENCE_S
    while any(_holders(tensor) > count for tensor, count in before) and time.monotonic() < until:
        time.sleep(0)


def _holders(tensor: torch.Tensor) -> int:
    """References to a tensor, all of Python's being one, and tensors that are views of the same storage."""
    views = torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)
    return int(tensor._use_count() + views)  # type: ignore[attr-defined]


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)
