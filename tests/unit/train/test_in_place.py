"""What is kept of an out-of-memory that is met in place."""

from __future__ import annotations

import pytest
import torch

from vramplan.measure.marker import is_out_of_memory
from vramplan.train.in_place import InPlace, live_bytes, without_frames


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUDA error: out of memory\nmore"),
    ],
)
def test_what_is_raised_again_is_still_told_for_what_it_is(error):
    kind, message = without_frames(error)
    assert type(error) is kind
    assert is_out_of_memory(kind.__name__, str(kind(f"{message}\nbytes are still held")))
    assert message.splitlines()[0]


def test_tensors_without_memory_are_alive_and_count_nothing():
    from torch._subclasses.fake_tensor import FakeTensorMode

    before = live_bytes(torch.device("cpu"))
    with FakeTensorMode():
        kept = [torch.empty(1 << 20), torch.empty(1 << 20, device="meta")]
    kept.append(torch.empty(1 << 20, device="meta"))
    assert live_bytes(torch.device("cpu")) == before
    kept.append(torch.empty(1 << 10))
    assert live_bytes(torch.device("cpu")) == before + 4096


def test_what_fails_again_whatever_the_size_is_not_tried_again():
    retry = object.__new__(InPlace)
    retry.is_safe = True
    assert retry.may_retry(RuntimeError("DefaultCPUAllocator: can't allocate memory"), 4)
    assert not retry.may_retry(RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1)
    assert not retry.may_retry(RuntimeError("could not create a primitive"), 4)
    assert not retry.may_retry(RuntimeError("a fault of the program"), 4)
