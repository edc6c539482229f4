"""Stands for DeepSpeed's compiled reading and writing of files (csrc/aio/py_lib, ``deepspeed_io_handle_t``): fakes have
no values to be written, and its page-locked buffers are plain tensors of the host's memory."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from vramplan.spec.run import RunSpec


@contextmanager
def elsewhere(run: RunSpec) -> Iterator[RunSpec]:
    """The run with a directory of its own in the place of ``zero.nvme_path``, where DeepSpeed makes folders and removes
    those of other runs (swap_tensor/partitioned_param_swapper.py, ``_configure_aio``)."""
    if run.zero.nvme_path is None:
        yield run
        return
    with tempfile.TemporaryDirectory() as directory:
        yield run.model_copy(update={"zero": run.zero.model_copy(update={"nvme_path": directory})})


class NoDiskBuilder:
    """In place of ``AsyncIOBuilder``."""

    def load(self, verbose: bool = True) -> type[NoDiskBuilder]:
        return NoDiskBuilder

    @staticmethod
    def aio_handle(**_: Any) -> _Handle:
        return _Handle()


class _Handle:
    """Counts what was asked for, and remembers which buffers are its own."""

    def __init__(self) -> None:
        self._pending = 0
        self._pinned: set[int] = set()

    def async_pread(self, buffer: torch.Tensor, path: str, offset: int) -> int:
        self._pending += 1
        return 0

    async_pwrite = async_pread

    def wait(self) -> int:
        done, self._pending = self._pending, 0
        return done

    def new_cpu_locked_tensor(self, numel: int, like: torch.Tensor) -> torch.Tensor:
        made = torch.empty(numel, dtype=like.dtype, device="cpu")
        self._pinned.add(made.untyped_storage()._cdata)
        return made

    def free_cpu_locked_tensor(self, tensor: torch.Tensor) -> bool:
        self._pinned.discard(tensor.untyped_storage()._cdata)
        return True

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._pinned
