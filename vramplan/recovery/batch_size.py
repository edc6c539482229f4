"""A drop-in for ``accelerate.utils.find_executable_batch_size`` that keeps the global batch."""

from __future__ import annotations

import functools
import gc
import inspect
import sys
from collections.abc import Callable
from typing import Any, TypeVar

from vramplan.measure.marker import is_out_of_memory

Result = TypeVar("Result")
ACCUMULATION = "gradient_accumulation_steps"
"""The parameter by which the decorated function learns how many micro-batches make the global batch."""


def find_executable_batch_size(
    function: Callable[..., Result] | None = None,
    starting_batch_size: int = 128,
    reduce_batch_size_fn: Callable[[], int] | None = None,
    *,
    gradient_accumulation_steps: int = 1,
) -> Any:
    """Decorates a function that trains, so that it is called again with a smaller batch when memory runs out.

    As accelerate's, with these differences: the function is given, beside ``batch_size`` as its first argument,
    ``gradient_accumulation_steps`` as a keyword, and ``batch_size * gradient_accumulation_steps`` never changes, so
    only batch sizes are tried that divide it; the failed call's frames, which hold its activations, are gone before
    memory is freed; every text of out-of-memory is known (``is_out_of_memory``). ``reduce_batch_size_fn`` gives an
    upper bound of the next size. With several processes nothing is tried again: peers would wait for ever, and the
    error is passed on.

    Raises:
        TypeError: the function takes no ``gradient_accumulation_steps``.
        RuntimeError: memory runs out with a batch of one.
    """
    if function is None:
        return functools.partial(
            find_executable_batch_size,
            starting_batch_size=starting_batch_size,
            reduce_batch_size_fn=reduce_batch_size_fn,
            gradient_accumulation_steps=gradient_accumulation_steps,
        )
    parameters = inspect.signature(function).parameters
    takes_all = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values())
    if ACCUMULATION not in parameters and not takes_all:
        raise TypeError(
            f"{function.__name__}() must take {ACCUMULATION}: a smaller batch needs more of them for the global batch "
            "to stay the same"
        )
    search = _Search(function, starting_batch_size, gradient_accumulation_steps, reduce_batch_size_fn)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return search.call(*args, **kwargs)

    return call


class _Search:
    """The batch size found so far; it stays from call to call."""

    def __init__(
        self,
        function: Callable[..., Any],
        batch_size: int,
        accumulation: int,
        reduce_batch_size_fn: Callable[[], int] | None,
    ) -> None:
        self._function, self._batch_size = function, batch_size
        self._global_batch_size = batch_size * accumulation
        self._reduce = reduce_batch_size_fn

    def call(self, *args: Any, **kwargs: Any) -> Any:
        while True:
            _free_memory()
            accumulation = {ACCUMULATION: self._global_batch_size // self._batch_size}
            try:
                return self._function(self._batch_size, *args, **kwargs, **accumulation)
            except Exception as error:
                if not is_out_of_memory(type(error).__name__, str(error)) or _has_peers():
                    raise
                message = (str(error).strip().splitlines() or [type(error).__name__])[0]
            # here the exception is gone, and with it the frames that held the failed call's tensors
            if self._batch_size == 1:
                raise RuntimeError(f"No executable batch size found: memory runs out with a batch of 1 ({message})")
            self._batch_size = self._next()

    def _next(self) -> int:
        """The largest smaller size that divides the global batch."""
        limit = self._batch_size - 1
        if self._reduce is not None:
            limit = min(limit, self._reduce())
        sizes = (size for size in range(limit, 0, -1) if self._global_batch_size % size == 0)
        return next(sizes, 1)


def _free_memory() -> None:
    gc.collect()
    torch: Any = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def _has_peers() -> bool:
    torch: Any = sys.modules.get("torch")
    if torch is None or not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return False
    return int(torch.distributed.get_world_size()) > 1
