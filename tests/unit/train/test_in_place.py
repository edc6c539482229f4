"""What is kept of an out-of-memory that is met in place."""

from __future__ import annotations

import pytest
import torch

from vramplan.measure.marker import is_out_of_memory
from vramplan.train.in_place import without_frames


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
