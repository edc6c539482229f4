"""What an optimizer keeps and what its step makes besides, in bytes an element of the master weights."""

from __future__ import annotations

from dataclasses import dataclass, replace

from vramplan.errors import UnknownNameError
from vramplan.facts.dtype import Dtype

PAGED_NUMEL = 100_000
"""Tensors of at least as many elements keep their states in paged memory (bitsandbytes/optim/optimizer.py,
``get_state_buffer``)."""


@dataclass(frozen=True, slots=True)
class OptimizerBytes:
    """``state``: kept between steps; ``scratch``: made within a step and gone at its end."""

    state: int
    scratch: int
    block: int = 0
    """Elements that share one scale a moment, where moments are kept in 8 bits; 0: they are not."""
    paged: bool = False
    """Whether the moments of large tensors lie in memory that the driver may keep on the host."""

    def in_formats(self, moment: Dtype, master: Dtype) -> OptimizerBytes:
        """The same with moments and master weights of other formats than fp32; temporaries have the master's."""
        if self.block or moment is master is Dtype.FP32:
            return self
        wide = Dtype.FP32.nbytes
        return replace(self, state=self.state * moment.nbytes // wide, scratch=self.scratch * master.nbytes // wide)

    def state_bytes(self, *tensors: int) -> int:
        """What is kept on the device for tensors of these numbers of elements."""
        tables = 2 * _TABLE_BYTES if self.block else 0
        return sum(self.tensor_bytes(numel) for numel in tensors) + tables - self.paged_bytes(*tensors)

    def paged_bytes(self, *tensors: int) -> int:
        """What is kept in memory that the driver may keep on the host; scales of 8-bit moments are not."""
        return self.state * sum(numel for numel in tensors if numel >= PAGED_NUMEL) if self.paged else 0

    def tensor_bytes(self, numel: int) -> int:
        """What is kept for one tensor (bitsandbytes/optim/optimizer.py, ``Optimizer2State.init_state``: small ones keep
        fp32 moments)."""
        if not self.block:
            return self.state * numel
        if numel < _MIN_8BIT_NUMEL:
            return 8 * numel
        return self.state * numel + 2 * 4 * -(-numel // self.block)


_MIN_8BIT_NUMEL = 4096
"""``min_8bit_size``."""
_TABLE_BYTES = 256 * 4
"""One table of 256 fp32 values a moment, shared by all tensors (``name2qmap``)."""


_KNOWN = {
    # deepspeed/ops/adam/fused_adam.py: exp_avg and exp_avg_sq like the fp32 master; one kernel, no temporary
    "adamw": OptimizerBytes(8, 0),
    # torch/optim/adamw.py, _single_tensor_adamw: sqrt() and the division make two tensors
    "adamw_torch": OptimizerBytes(8, 8),
    # torch/optim/adamw.py, _fused_adamw: one kernel
    "adamw_torch_fused": OptimizerBytes(8, 0),
    # torch/optim/sgd.py without momentum: grad.add(param, alpha=weight_decay) makes one tensor
    "sgd": OptimizerBytes(0, 4),
    # torch/optim/_adafactor.py on one flat vector, which it does not factor: its variance; the square of the gradient
    # and a copy of the variance
    "adafactor": OptimizerBytes(4, 8),
    # deepspeed/runtime/zero/muon/muon_optimizer.py, of what is no matrix: FusedAdam's; memory/muon.py has the rest
    "muon": OptimizerBytes(8, 0),
}
# torch/optim/sgd.py with momentum: a buffer besides
_SGD_MOMENTUM = OptimizerBytes(4, 4)
_ONLY_ON_CUDA = {
    # deepspeed/ops/lion/fused_lion.py: exp_avg like the fp32 master; one kernel
    "lion": OptimizerBytes(4, 0),
    # bitsandbytes/optim/adamw.py, AdamW8bit: two moments in uint8, an fp32 scale each for 256 elements; one kernel
    "adamw_8bit": OptimizerBytes(2, 0, block=256),
    "paged_adamw": OptimizerBytes(8, 0, paged=True),
    "paged_adamw_8bit": OptimizerBytes(2, 0, block=256, paged=True),
}
_ONLY_ON_CPU = {
    # bitsandbytes/backends/cpu/ops.py, _optimizer_update_8bit_blockwise_cpu: both moments and the gradient in fp32, the
    # root and the quotient
    "adamw_8bit": OptimizerBytes(2, 20, block=256),
}
_FOREACH_ON_CUDA = {
    # torch/optim/adamw.py, _multi_tensor_adamw (the default on CUDA): _foreach_sqrt makes one list
    "adamw_torch": OptimizerBytes(8, 4),
}


def optimizer_bytes(kind: str, device: str, momentum: float = 0.0) -> OptimizerBytes:
    """Bytes an element for an optimizer kind on ``cuda`` or ``cpu``.

    Raises:
        UnknownNameError: no bytes are known for that kind yet.
    """
    if kind == "sgd" and momentum:
        return _SGD_MOMENTUM
    if device == "cuda" and kind in _FOREACH_ON_CUDA:
        return _FOREACH_ON_CUDA[kind]
    if device == "cuda" and kind in _ONLY_ON_CUDA:
        return _ONLY_ON_CUDA[kind]
    if device == "cpu" and kind in _ONLY_ON_CPU:
        return _ONLY_ON_CPU[kind]
    if kind not in _KNOWN:
        raise UnknownNameError("optimizer", kind, _KNOWN, "(no bytes are known of it)")
    return _KNOWN[kind]
