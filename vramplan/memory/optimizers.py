"""What an optimizer keeps and what its step makes besides, in bytes an element of the master weights."""

from __future__ import annotations

from dataclasses import dataclass

from vramplan.errors import UnknownNameError


@dataclass(frozen=True, slots=True)
class OptimizerBytes:
    """``state``: kept between steps; ``scratch``: made within a step and gone at its end."""

    state: int
    scratch: int


_KNOWN = {
    # deepspeed/ops/adam/fused_adam.py: exp_avg and exp_avg_sq like the fp32 master; one kernel, no temporary
    "adamw": OptimizerBytes(8, 0),
    # torch/optim/adamw.py, _single_tensor_adamw: sqrt() and the division make two tensors
    "adamw_torch": OptimizerBytes(8, 8),
    # torch/optim/adamw.py, _fused_adamw: one kernel
    "adamw_torch_fused": OptimizerBytes(8, 0),
    # torch/optim/sgd.py without momentum: grad.add(param, alpha=weight_decay) makes one tensor
    "sgd": OptimizerBytes(0, 4),
}
_FOREACH_ON_CUDA = {
    # torch/optim/adamw.py, _multi_tensor_adamw (the default on CUDA): _foreach_sqrt makes one list
    "adamw_torch": OptimizerBytes(8, 4),
}


def optimizer_bytes(kind: str, device: str) -> OptimizerBytes:
    """Bytes an element for an optimizer kind on ``cuda`` or ``cpu``.

    Raises:
        UnknownNameError: no bytes are known for that kind yet.
    """
    if device == "cuda" and kind in _FOREACH_ON_CUDA:
        return _FOREACH_ON_CUDA[kind]
    if kind not in _KNOWN:
        raise UnknownNameError("optimizer", kind, _KNOWN, "whose bytes are known")
    return _KNOWN[kind]
