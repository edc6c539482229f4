"""Autocast on the simulated GPU as a CUDA build of torch does it: which operators cast, and which casts are kept.

torch registers its casting kernels for CUDA in C++; a device type registered from Python has none. They are made here
again from aten/src/ATen/autocast_mode.{h,cpp}: the lists, ``cached_cast`` and the policies.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

_KEY = "AutocastPrivateUse1"
_KEYS = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, _KEY))

LOWER_PRECISION = [
    "_convolution.deprecated",
    "_convolution",
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_tbc",
    "conv_transpose1d",
    "conv_transpose2d.input",
    "conv_transpose3d.input",
    "convolution",
    "prelu",
    "addmm",
    "addmv",
    "addr",
    "matmul",
    "einsum",
    "mm",
    "mv",
    "linalg_vecdot",
    "linear",
    "addbmm",
    "baddbmm",
    "bmm",
    "chain_matmul",
    "linalg_multi_dot",
    "_scaled_dot_product_flash_attention",
    "scaled_dot_product_attention",
]
"""AT_FORALL_LOWER_PRECISION_FP, without recurrent cells."""
FLOAT32 = [
    "acos",
    "asin",
    "cosh",
    "erfinv",
    "exp",
    "expm1",
    "log",
    "log10",
    "log2",
    "log1p",
    "reciprocal",
    "rsqrt",
    "sinh",
    "tan",
    "pow.Tensor_Scalar",
    "pow.Tensor_Tensor",
    "pow.Scalar",
    "softplus",
    "layer_norm",
    "native_layer_norm",
    "rms_norm",
    "group_norm",
    "cosine_similarity",
    "nll_loss",
    "kl_div",
    "l1_loss",
    "smooth_l1_loss",
    "huber_loss",
    "mse_loss",
    "binary_cross_entropy_with_logits",
    "dist",
    "renorm",
    "logsumexp",
]
"""AT_FORALL_FP32, without losses and interpolations that no language model calls."""
FLOAT32_RESULT = [
    "prod",
    "prod.dim_int",
    "softmax.int",
    "log_softmax.int",
    "cumprod",
    "cumsum",
    "linalg_vector_norm",
    "linalg_matrix_norm",
    "linalg_matrix_norm.str_ord",
    "sum",
    "sum.dim_IntList",
]
"""AT_FORALL_FP32_SET_OPT_DTYPE: the result's dtype is said instead of casting the input."""
WIDEST = [
    "addcdiv",
    "addcmul",
    "atan2",
    "bilinear",
    "cross",
    "dot",
    "vdot",
    "grid_sampler",
    "index_put",
    "tensordot",
    "scatter_add",
]
"""AT_FORALL_PROMOTE: all inputs in the widest dtype among them."""

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


class CudaAutocast:
    """The casting kernels of one device type; torch registers them once in a process (``cuda_autocast``)."""

    def __init__(self, device_type: str) -> None:
        self._device_type = device_type
        self._kept: dict[int, tuple[weakref.ref[torch.Tensor], torch.Tensor]] = {}
        self._fallback = torch.library.Library("_", "IMPL")
        self._fallback.fallback(torch.library.fallthrough_kernel, _KEY)
        self._aten = torch.library.Library("aten", "IMPL", _KEY)
        for names, policy in (
            (LOWER_PRECISION, self._lower_precision),
            (FLOAT32, self._float32),
            (FLOAT32_RESULT, self._float32_result),
            (WIDEST, self._widest),
        ):
            for name in names:
                self._aten.impl(name, policy(_overload(name)))

    def clear(self) -> None:
        """Drops the kept casts (``torch.clear_autocast_cache``, at the end of the outermost region)."""
        self._kept.clear()

    def lowered(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function`` in place of an operator of ``LOWER_PRECISION``: cast where autocast is on."""
        cast = self._lower_precision(function)

        def call(*args: Any, **kwargs: Any) -> Any:
            enabled = torch.is_autocast_enabled(self._device_type)
            return (cast if enabled else function)(*args, **kwargs)

        return call

    def _lower_precision(self, op: Callable[..., Any]) -> Callable[..., Any]:
        def kernel(*args: Any, **kwargs: Any) -> Any:
            return self._call_cast(op, torch.get_autocast_dtype(self._device_type), args, kwargs)

        return kernel

    def _float32(self, op: Callable[..., Any]) -> Callable[..., Any]:
        def kernel(*args: Any, **kwargs: Any) -> Any:
            return self._call_cast(op, torch.float32, args, kwargs)

        return kernel

    def _float32_result(self, op: Any) -> Callable[..., Any]:
        names = [argument.name for argument in op._schema.arguments]

        def kernel(*args: Any, **kwargs: Any) -> Any:
            said = {**dict(zip(names, args, strict=False)), **kwargs}
            if self._eligible(args[0]) and said.get("dtype") is None:
                said["dtype"] = torch.float32
            with torch._C._ExcludeDispatchKeyGuard(_KEYS):
                return op(**said)

        return kernel

    def _widest(self, op: Callable[..., Any]) -> Callable[..., Any]:
        def kernel(*args: Any, **kwargs: Any) -> Any:
            dtype = torch.get_autocast_dtype(self._device_type)
            for value in args:
                if self._eligible(value):
                    dtype = torch.promote_types(dtype, value.dtype)
            return self._call_cast(op, dtype, args, kwargs)

        return kernel

    def _call_cast(
        self, op: Callable[..., Any], dtype: torch.dtype, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """``op`` of its arguments cast, the last first.

        ``WrapFunction_::call`` casts in the list of arguments of a call (autocast_mode.h), which the compiler of
        torch's builds evaluates from the right. Backward comes first to the copy made last.
        """
        with torch._C._ExcludeDispatchKeyGuard(_KEYS):

            def cast(value: Any) -> Any:
                return tree_map_only(torch.Tensor, lambda tensor: self._cast(tensor, dtype), value)

            named = {name: cast(value) for name, value in reversed(kwargs.items())}
            return op(*[cast(value) for value in reversed(args)][::-1], **named)

    def _cast(self, value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """``cached_cast``: casts of fp32 leaves that are trained are kept until the region ends."""
        if not self._eligible(value) or value.dtype is dtype:
            return value
        if not self._is_kept(value, dtype):
            return value.to(dtype)
        found = self._kept.get(id(value))
        if found is not None and found[0]() is value:
            return found[1]
        cast = value.to(dtype)
        self._kept[id(value)] = (weakref.ref(value), cast)
        return cast

    def _is_kept(self, value: torch.Tensor, dtype: torch.dtype) -> bool:
        return (
            torch.is_autocast_cache_enabled()
            and dtype is torch.get_autocast_dtype(self._device_type)
            and value.dtype is torch.float32
            and value.requires_grad
            and value.is_leaf
            and value._base is None
        )

    def _eligible(self, value: Any) -> bool:
        return isinstance(value, torch.Tensor) and value.device.type == self._device_type and value.dtype in _FLOATS


@lru_cache(maxsize=1)
def cuda_autocast(device_type: str) -> CudaAutocast:
    """The process's casting kernels."""
    return CudaAutocast(device_type)


def _overload(name: str) -> Callable[..., Any]:
    packet, _, overload = name.partition(".")
    found: Callable[..., Any] = getattr(getattr(torch.ops.aten, packet), overload or "default")
    return found
