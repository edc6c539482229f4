"""Number formats and their width in bytes."""

from __future__ import annotations

from enum import Enum


class Dtype(Enum):
    """A tensor element's format; ``.nbytes`` is its width in bytes (``torch.finfo``)."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"
    INT64 = "int64"
    INT32 = "int32"
    BOOL = "bool"
    UINT8 = "uint8"

    nbytes: int
    """Bytes of one element."""


for _dtype, _nbytes in {
    Dtype.FP32: 4,
    Dtype.BF16: 2,
    Dtype.FP16: 2,
    Dtype.INT64: 8,
    Dtype.INT32: 4,
    Dtype.BOOL: 1,
    Dtype.UINT8: 1,
}.items():
    _dtype.nbytes = _nbytes
