"""Matrix products: what each allocates, what it saves for backward, what its backward allocates (see ``ops.py``)."""

from __future__ import annotations

from vramplan.facts.dtype import Dtype
from vramplan.memory.kernels import TEMPORARY, WEIGHT_GRADIENT
from vramplan.memory.quantized import BLOCK
from vramplan.memory.size import ZERO, Size
from vramplan.memory.tape import Backward, Node, Tape, Tensor
from vramplan.memory.views import GRADIENTS

ONEDNN_BUFFER_BYTES = 107_520
"""What oneDNN holds while a bf16 product runs on a CPU: of (256 x 320) by (320 x 192), as torch's profiler says of
torch 2.13 on one thread of a CPU with AVX-512. Narrower inner sides hold less (70,656 B at 8), wider ones more (132,096
B at 1,024), as the processor's instructions have it; products in fp32 and fp16 hold none there."""


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out_numel: Size,
    label: str,
    zero3: bool = False,
    whole: Tensor | None = None,
    flat: bool = False,
) -> Tensor:
    """``F.linear``: saves x if the weight is trained, the weight if x needs a gradient.

    Backward makes the gradient of x, then of the weight (``mm``: self, then mat2), and a bias's by a sum.
    ``zero3``: DeepSpeed's own function in its place, which always saves x and whose gradients are no views
    (deepspeed/runtime/zero/linear.py, ``LinearFunctionForZeroStage3``). ``whole``: the gathered weight that is saved in
    the weight's place. ``flat``: x is a matrix, not 3-D, so its gradient is no view.
    """
    tape = x.storage.tape
    need_x, need_w = x.requires_grad, weight.requires_grad
    need_b = bias is not None and bias.requires_grad
    saved = ([x] if need_w or zero3 else []) + ([whole if whole is not None else weight] if need_x or zero3 else [])
    x_numel, dtype, w_numel = x.numel, x.dtype, weight.numel
    b_numel = bias.numel if bias is not None else ZERO

    def backward(node: Node, grads: list[Tensor | None]) -> list[Tensor | None]:
        held = [node.unpack(index) for index in range(len(node.saved))]
        grad_x = grad_w = grad_b = None
        if need_x:
            grad_x = tape.new(x_numel, dtype, GRADIENTS)
            grad_x.is_view = not zero3 and not flat
        if need_w:
            grad_w = tape.new(w_numel, dtype, WEIGHT_GRADIENT)
            grad_w.is_view = not zero3
        if need_b:
            grad_b = tape.new(b_numel, dtype, WEIGHT_GRADIENT)
        del held
        return [grad_x, grad_w, grad_b] if zero3 else [grad_x, grad_b, grad_w]

    if zero3:  # a Python function saves when it has run
        return tape.attach("linear", tape.new(out_numel, dtype, label), [x, weight, bias], saved, backward)
    # in F.linear the weight's gradient passes its transpose first
    return _product(tape, [x, bias, weight], saved, backward, out_numel, dtype, label)


def _product(
    tape: Tape,
    inputs: list[Tensor | None],
    saved: list[Tensor],
    backward: Backward,
    numel: Size,
    dtype: Dtype,
    label: str,
) -> Tensor:
    """The result of a matrix product, which saves its inputs before it runs: recomputing can end between the two."""
    node = tape.record("product", inputs, saved, backward)
    out = tape.new(numel, dtype, label)
    _hold_buffer(tape, dtype)
    out.node = node
    return out


def _hold_buffer(tape: Tape, dtype: Dtype) -> None:
    """A product runs whose result is there."""
    if tape.kernel_buffers and dtype is Dtype.BF16:
        tape.new((ONEDNN_BUFFER_BYTES, 0, 0, 0, 0), Dtype.UINT8, TEMPORARY)


def linear_4bit(x: Tensor, w_numel: int, out_numel: Size, label: str, stored: Dtype, device: str) -> Tensor:
    """``bitsandbytes.matmul_4bit`` of a frozen weight: saves no activation.

    Forward makes the weight's scales in fp32, on CUDA twice, and writes the weight out in x's format
    (bitsandbytes/backends/cuda/ops.py, ``_dequant_linear_fallback``, which takes more than 1,536 rows; fewer rows may
    take a fused kernel; backends/default/ops.py, ``_gemm_4bit_default_impl``). Backward makes the scales once and lets
    go of them, and writes the weight out in the format that it was ``stored`` from, then in the gradient's
    (autograd/_functions.py, ``MatMul4Bit.backward``).
    """
    tape, x_numel, dtype = x.storage.tape, x.numel, x.dtype
    scales, weight = (w_numel // BLOCK, 0, 0, 0, 0), (w_numel, 0, 0, 0, 0)
    temporary = [tape.new(scales, Dtype.FP32, TEMPORARY) for _ in range(2)]
    if device == "cpu":
        del temporary[0]
    temporary.append(tape.new(weight, dtype, TEMPORARY))
    out = tape.new(out_numel, dtype, label)
    del temporary

    def backward(node: Node, grads: list[Tensor | None]) -> list[Tensor | None]:
        scale = tape.new(scales, Dtype.FP32, TEMPORARY)
        written = tape.new(weight, stored, TEMPORARY)
        del scale
        if stored is not dtype:
            written = tape.new(weight, dtype, TEMPORARY)
        grad_x = tape.new(x_numel, dtype, GRADIENTS)
        grad_x.is_view = True
        del written
        return [grad_x]

    return tape.attach("linear_4bit", out, [x], [], backward)


def matmul(a: Tensor, b: Tensor, out_numel: Size, label: str, scaled: bool = False) -> Tensor:
    """A batched product of two activations (``bmm``): each saved if the other needs a gradient.

    ``scaled``: the product is also multiplied by a number (``baddbmm``), and so is each gradient, into a new tensor.
    """
    tape = a.storage.tape
    need_a, need_b = a.requires_grad, b.requires_grad
    saved = ([a] if need_b else []) + ([b] if need_a else [])
    a_numel, b_numel, dtype = a.numel, b.numel, a.dtype

    def backward(node: Node, grads: list[Tensor | None]) -> list[Tensor | None]:
        held = [node.unpack(index) for index in range(len(node.saved))]
        grad_a = tape.new(a_numel, dtype, GRADIENTS) if need_a else None
        if scaled and grad_a is not None:
            grad_a = tape.new(a_numel, dtype, GRADIENTS)
        grad_b = tape.new(b_numel, dtype, GRADIENTS) if need_b else None
        if scaled and grad_b is not None:
            grad_b = tape.new(b_numel, dtype, GRADIENTS)
        for grad in (grad_a, grad_b):
            if grad is not None:
                grad.is_view = True
        del held
        return [grad_a, grad_b]

    return _product(tape, [a, b], saved, backward, out_numel, dtype, label)
