"""What kernels allocate and free inside an operator, where an operator on a fake tensor shows its result alone.

Read off ATen's source; only what is large enough to matter is here. Each function gets the operator's arguments and
its ``result``, and returns bytes that live together before the operator returns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from vramplan.simulate.tracker import Scratch

aten = torch.ops.aten


def safe_softmax(scores: torch.Tensor, dim: int, *_: Any, result: torch.Tensor, **__: Any) -> Sequence[int]:
    """aten/src/ATen/native/SoftMax.cpp ``_safe_softmax``: where scores are minus infinity (bool), whether a whole row
    is (bool), and a zero of the result's dtype."""
    rows = scores.numel() // scores.shape[dim]
    return scores.numel(), rows, result.element_size()


def log_sum_exp(x: torch.Tensor, *_: Any, result: torch.Tensor, **__: Any) -> Sequence[int]:
    """ReduceOps.cpp ``logsumexp_out_impl``: each row's largest, and ``x`` less that, of which it takes exponents."""
    return result.nbytes, x.nbytes


def widened_operands(one: Any, other: Any, *_: Any, result: torch.Tensor, **__: Any) -> Sequence[int]:
    """TensorIterator.cpp ``compute_types``, ``promote_inputs_to_common_dtype``: on the CPU an operand of another format
    than the operator computes in is copied first. A number is no operand."""
    operands = [each for each in (one, other) if isinstance(each, torch.Tensor) and each.dim()]
    if len({each.dtype for each in operands}) < 2:
        return ()
    common = torch.result_type(one, other)
    return [each.numel() * common.itemsize for each in operands if each.dtype is not common]


def widened_in_place(one: torch.Tensor, other: Any, *_: Any, result: torch.Tensor, **__: Any) -> Sequence[int]:
    """The same, and a result that is narrower is made in the wide format first (``cast_common_dtype_to_outputs``)."""
    copies = widened_operands(one, other, result=result)
    common = torch.result_type(one, other)
    return copies if not copies or one.dtype is common else (*copies, one.numel() * common.itemsize)


def summed_in_fp32(*_: Any, result: torch.Tensor, **__: Any) -> Sequence[int]:
    """ATen/native/cpu/ScatterGatherKernel.cpp, ``create_acc_buffer``: in a low precision the whole result is made in
    fp32 first (seen with the profiler: 4 bytes an element, of ``gather``'s result too)."""
    low = result.dtype in (torch.float16, torch.bfloat16)
    return [result.numel() * 4] if low else ()


CPU_SCRATCH: dict[Any, Scratch] = {
    aten._safe_softmax.default: safe_softmax,
    aten.logsumexp.default: log_sum_exp,
    **{packet.Tensor: widened_operands for packet in (aten.add, aten.sub, aten.mul, aten.div)},
    **dict.fromkeys(
        (
            aten.gather.default,
            aten.scatter.src,
            aten.scatter.value,
            aten.scatter_.src,
            aten.scatter_.value,
            aten.scatter_add.default,
            aten.scatter_add_.default,
        ),
        summed_in_fp32,
    ),
    **{packet.Tensor: widened_in_place for packet in (aten.add_, aten.sub_, aten.mul_, aten.div_)},
}


def flash_backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *_: Any,
    result: Any,
    **__: Any,
) -> Sequence[int]:
    """flash_api.cpp ``mha_bwd``: row sums of the gradient (fp32), the query's gradient summed in fp32, and with fewer
    key heads than query heads the gradients of keys and values for every query head. Rows are rounded up to 128,
    widths to 32 (to 64 above 128)."""
    batch, heads, rows, width = query.shape
    key_heads, columns = key.shape[1], key.shape[2]
    rows_rounded = -(-rows // 128) * 128
    step = 32 if width <= 128 else 64
    width_rounded = -(-width // step) * step
    sums = batch * heads * rows_rounded * 4
    query_grad = batch * rows_rounded * heads * width_rounded * 4
    per_head = batch * columns * heads * width * query.element_size() if key_heads != heads else 0
    return sums, query_grad, per_head, per_head


def efficient_backward(grad_out: torch.Tensor, query: torch.Tensor, *_: Any, result: Any, **__: Any) -> Sequence[int]:
    """attention_backward.cu ``_efficient_attention_backward``: row sums of the gradient times the output (fp32), and
    the query's gradient summed in fp32, tile by tile (kernel_backward.h ``workspace_size``, with 128 rows and 64
    columns a tile as the kernel of wide heads has them)."""
    batch, heads, rows, width = query.shape
    tile = 128 * 64 * 4 + 16
    return batch * heads * rows * 4, batch * heads * -(-rows // 128) * -(-width // 64) * tile


CUDA_SCRATCH: dict[Any, Scratch] = {
    aten._safe_softmax.default: safe_softmax,
    aten._scaled_dot_product_flash_attention_backward.default: flash_backward,
    aten._scaled_dot_product_efficient_attention_backward.default: efficient_backward,
}
