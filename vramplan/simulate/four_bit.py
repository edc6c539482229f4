"""bitsandbytes on fake tensors: its 4-bit parameter, and what its kernels allocate.

Its own code runs: ``Params4bit``, ``Linear4bit``, ``quantize_4bit``, ``MatMul4Bit``. Replaced are the making of the
parameter's object (torch makes no second Python object of a fake), the table of 256 values, which is worked out from
values, and operators whose kernels are written in Python with temporaries of their own: a fake result would hide them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch._C import DispatchKey
from torch._subclasses import FakeTensor

from vramplan.simulate.tracker import Answer, Tracker

DYNAMIC_MAP_NUMEL = 256
"""Values of ``create_dynamic_map`` (bitsandbytes/functional.py)."""


def four_bit_answers() -> dict[Any, Answer]:
    """How the tracker answers bitsandbytes' operators."""
    import bitsandbytes  # noqa: F401 - registers them

    ops = torch.ops.bitsandbytes
    return {ops.gemm_4bit.default: _gemm, ops.quantize_4bit.default: _default_on_host}


@contextmanager
def four_bit_fakes() -> Iterator[None]:
    """For the duration of the context bitsandbytes makes its parameters and tables of fakes."""
    import bitsandbytes.backends.default.ops as default_ops
    import bitsandbytes.functional as functional
    from bitsandbytes.nn import Params4bit

    class FakeParams4bit(Params4bit, FakeTensor):  # type: ignore[misc]  # bitsandbytes is untyped
        """A 4-bit parameter that is a fake tensor."""

    FakeParams4bit.__name__ = Params4bit.__name__  # by which PEFT knows it (dequantize_module_weight)
    make = torch.Tensor._make_subclass

    def make_fake(cls: type, data: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if cls not in (Params4bit, FakeParams4bit) or not isinstance(data, FakeTensor):
            return make(cls, data, *args, **kwargs)
        made = data.detach().requires_grad_(bool(args and args[0]))
        made.__class__ = FakeParams4bit
        return made

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch.Tensor, "_make_subclass", make_fake))
        stack.enter_context(mock.patch.object(functional, "create_dynamic_map", _dynamic_map))
        stack.enter_context(mock.patch.dict(functional.name2qmap, clear=True))
        stack.enter_context(mock.patch.object(default_ops, "_get_4bit_quantize_bounds", _kept_bounds()))
        yield


def _dynamic_map(*_: Any, **__: Any) -> torch.Tensor:
    return torch.empty(DYNAMIC_MAP_NUMEL)


def _kept_bounds() -> Callable[[str, torch.device], tuple[torch.Tensor, torch.Tensor]]:
    """``_get_4bit_quantize_bounds`` of one trace: the 15 midpoints of 16 values and their order, kept as the values
    are (both functions remember what they made)."""
    kept: dict[tuple[str, torch.device], tuple[torch.Tensor, ...]] = {}

    def bounds(quant_type: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        if (quant_type, device) not in kept:
            order = torch.empty(16, dtype=torch.int64, device=device)
            kept[quant_type, device] = torch.empty(15, device=device), order, torch.empty(16, device=device)
        midpoints, order, _ = kept[quant_type, device]
        return midpoints, order

    return bounds


def _gemm(tracker: Tracker, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """``gemm_4bit``: the weight is written out, then multiplied.

    On CUDA so from 1,537 rows on; fewer may take a fused kernel, by the GPU's generation and its number of
    multiprocessors (bitsandbytes/backends/cuda/ops.py, ``_gemm_4bit_use_custom_cuda``).
    """
    if args[0].device.type == "cpu":
        return _default_on_host(tracker, func, args, kwargs)
    with tracker:
        return _dequantized_linear(*args, **kwargs)


def _default_on_host(tracker: Tracker, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """On the CPU bitsandbytes' own kernel in Python; elsewhere a compiled one, which allocates only its result."""
    if args[0].device.type != "cpu":
        return func(*args, **kwargs)
    with tracker:
        return func._op_dk(DispatchKey.CompositeExplicitAutograd, *args, **kwargs)


def _dequantized_linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    shape: Sequence[int],
    absmax: torch.Tensor,
    blocksize: int,
    quant_type: str,
    bias: torch.Tensor | None = None,
    absmax_8bit: torch.Tensor | None = None,
    absmax_code: torch.Tensor | None = None,
    absmax_offset: torch.Tensor | None = None,
) -> torch.Tensor:
    """``_dequant_linear_fallback`` of bitsandbytes/backends/cuda/ops.py, a file that only a GPU can import: scales
    are written out twice, and both live until the product is there."""
    scales = [absmax]
    if absmax_8bit is not None and absmax_offset is not None:
        scales.append(torch.empty_like(absmax_8bit, dtype=torch.float32))
        scales.append(scales[-1] + absmax_offset)
    weight = torch.empty(shape, dtype=x.dtype, device=x.device)
    return torch.nn.functional.linear(x, weight, bias)
