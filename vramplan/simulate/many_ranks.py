"""DeepSpeed's loops over all ranks, played in a few operators: the same bytes born and freed in the same order.

Under ZeRO-3 rank 0 makes a view of every rank's part of every gathered or reduced tensor (512 ranks: 512 views of
each). Views hold no bytes and a fake tensor has no values, so one view of each length stands for all of them.
"""

from __future__ import annotations

import math
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

_VIEWS_MADE_IN = "_all_gather_dtype"
"""partition_parameters.py:1349: a view of the gather's buffer for each rank."""


@contextmanager
def few_views() -> Iterator[None]:
    """DeepSpeed's ZeRO-3 with its loops over ranks shortened."""
    import deepspeed.runtime.zero.partition_parameters as partition_parameters
    import deepspeed.runtime.zero.stage3 as stage3

    handle = partition_parameters.AllGatherCoalescedHandle
    with (
        mock.patch.object(torch.Tensor, "narrow", _one_view_of_a_length()),
        mock.patch.object(handle, "wait", _wait_for_gather(handle.wait)),
        mock.patch.object(stage3, "reduce_scatter_coalesced", reduce_scatter_coalesced),
    ):
        yield


def _one_view_of_a_length() -> Callable[..., torch.Tensor]:
    """``Tensor.narrow``; while a gather makes its views, all of one length are the same one."""
    narrow: Any = torch.Tensor.narrow
    last: list[Any] = [lambda: None, 0, lambda: None]

    def narrow_once(self: torch.Tensor, dim: int, start: Any, length: Any) -> torch.Tensor:
        if sys._getframe(1).f_code.co_name != _VIEWS_MADE_IN:
            return narrow(self, dim, start, length)  # type: ignore[no-any-return]
        of, known_length, view = last
        known: torch.Tensor | None = view()
        if of() is self and known_length == length and known is not None:
            return known
        made: torch.Tensor = narrow(self, dim, start, length)
        last[:] = weakref.ref(self), length, weakref.ref(made)
        return made

    return narrow_once


def _wait_for_gather(wait: Any) -> Callable[..., None]:
    """AllGatherCoalescedHandle.wait (partition_parameters.py:766): each weight put together from all ranks' parts."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    def wait_with_few_views(self: Any, handle_dependency: bool = True) -> None:
        if self.complete or self.quantization:
            wait(self, handle_dependency=handle_dependency)
            return
        self.allgather_handle.wait()
        parts: list[torch.Tensor] = []
        for param in self.params:
            parts = [self.partitions[0].narrow(0, 0, 1)]
            whole = torch.cat([parts[0].expand(param.ds_numel)])
            param.data = whole.view(param.ds_shape).to(param.ds_tensor.dtype)
            del whole
            param.ds_status = ZeroParamStatus.AVAILABLE
        self.complete = True
        if not handle_dependency and not _is_synchronous():
            type(self).data_buffer.append(parts)

    return wait_with_few_views


def _is_synchronous() -> bool:
    from deepspeed.accelerator import get_accelerator

    return bool(get_accelerator().is_synchronized_device())


def reduce_scatter_coalesced(tensors: Sequence[torch.Tensor], group: Any = None) -> list[torch.Tensor]:
    """coalesced_collectives.py:77: this rank's part of every tensor, reduced over all ranks at once."""
    from deepspeed import comm
    from deepspeed.runtime.comm.coalesced_collectives import _torch_reduce_scatter_fn

    rank, world_size = comm.get_rank(group), comm.get_world_size(group)
    shares = [math.ceil(tensor.numel() / world_size) for tensor in tensors]
    if len(tensors) == 1 and tensors[0].numel() % world_size == 0:
        flat = tensors[0].view(-1)
    else:
        flat = _interleaved(tensors, shares, world_size)
    flat.div_(world_size)
    own = flat.narrow(0, rank * sum(shares), sum(shares))
    _torch_reduce_scatter_fn(flat, own, group=group)
    found, offset = [], 0
    for tensor, share in zip(tensors, shares, strict=True):
        held = min(share, max(0, tensor.numel() - rank * share))
        found.append(own.narrow(0, offset, held))
        offset += share
    return found


def _interleaved(tensors: Sequence[torch.Tensor], shares: Sequence[int], world_size: int) -> torch.Tensor:
    """Every rank's part of every tensor in the order of ranks, the short ones padded."""
    paddings = []
    for rank in range(world_size):
        for tensor, share in zip(tensors, shares, strict=True):
            missing = share - min(share, max(0, tensor.numel() - rank * share))
            if missing:
                paddings.append(torch.empty(missing, dtype=tensor.dtype, device=tensor.device))
    first = tensors[0].view(-1).narrow(0, 0, 1)
    return torch.cat([first.expand(world_size * sum(shares))])
