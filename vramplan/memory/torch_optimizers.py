"""What an optimizer of plain PyTorch keeps for each parameter, and what its step makes besides (torch 2.13)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from vramplan.errors import UnknownNameError
from vramplan.memory.optimizers import PAGED_NUMEL, optimizer_bytes

Numels = tuple[int, int]
"""Elements of a parameter, and of a row and a column of each of its matrices (of a vector: all)."""
FP32 = 4


@dataclass(frozen=True, slots=True)
class TorchOptimizer:
    """Slots and temporaries, in tensors of a parameter's shape and format unless ``fp32``.

    ``one_by_one``: parameters are updated in turn; each pair is an instant of an update: tensors left over from the
    parameter before, and tensors of the one in hand. Empty: all are updated at once.
    """

    slots: int
    at_once: int = 0
    one_by_one: tuple[tuple[int, int], ...] = ()
    made_in_turn: bool = False
    """Whether a parameter's slots come to be in its own first update, not all before the first."""
    factored: bool = False
    """Whether a matrix has a row and a column instead of each slot."""
    fp32: bool = False
    """Whether slots and temporaries are fp32 whatever the parameter's format."""
    low_one_by_one: tuple[tuple[int, int], ...] = ()
    """As ``one_by_one``, for parameters of a lower format than the slots, which are copied to be updated."""
    named: str = ""
    """The kind under which ``optimizer_bytes`` knows the slots, where they are none of the parameter's format."""
    paged: bool = False
    """Whether the slots of large parameters lie in memory that the driver may keep on the host."""
    over_groups: bool = False
    """Whether what is left over from a group's last parameter is there at the next group's first."""


_ADAMW = TorchOptimizer(slots=2, one_by_one=((1, 2),))
"""torch/optim/adam.py, ``_single_tensor_adam``: ``denom`` of the parameter before, the root and the quotient."""
_ADAMW_FOREACH = TorchOptimizer(slots=2, at_once=1)
"""torch/optim/adam.py, ``_multi_tensor_adam``: ``_foreach_sqrt`` makes one list."""
_ADAMW_FUSED = TorchOptimizer(slots=2)
_ADAFACTOR = TorchOptimizer(
    slots=1,
    one_by_one=((1, 2),),
    made_in_turn=True,
    factored=True,
    fp32=True,
    low_one_by_one=((3, 1), (2, 2), (1, 4)),
    over_groups=True,
)
"""transformers/optimization.py, ``Adafactor.step``: the update of the parameter before, then the square and its sum
with eps; of a bf16 parameter fp32 copies of gradient and weight besides."""


_ONLY_ON_CUDA = {
    # bitsandbytes/optim/adamw.py and lion.py: states in fp32, or in 8 bits with a scale for each block; one kernel
    "adamw_8bit": TorchOptimizer(slots=2, named="adamw_8bit"),
    "paged_adamw": TorchOptimizer(slots=2, fp32=True, paged=True),
    "paged_adamw_8bit": TorchOptimizer(slots=2, named="adamw_8bit", paged=True),
    "lion": TorchOptimizer(slots=1, fp32=True),
}


_ONLY_ON_CPU = {
    # bitsandbytes/backends/cpu/ops.py, _optimizer_update_8bit_blockwise_cpu: both moments and the gradient in fp32, the
    # root and the quotient; of a lower format a copy of the parameter besides
    "adamw_8bit": TorchOptimizer(
        slots=2, one_by_one=((0, 5),), low_one_by_one=((0, 6),), made_in_turn=True, fp32=True, named="adamw_8bit"
    ),
}


def torch_optimizer(kind: str, device: str, momentum: float) -> TorchOptimizer:
    """The optimizer that transformers' Trainer makes for a kind, on ``cuda`` or ``cpu``.

    Raises:
        UnknownNameError: no bytes are known for that kind under plain PyTorch.
    """
    every = device == "cuda"
    known = {
        "adamw": _ADAMW_FOREACH if every else _ADAMW,
        "adamw_torch": _ADAMW_FOREACH if every else _ADAMW,
        "adamw_torch_fused": _ADAMW_FUSED,
        "sgd": _sgd(every, momentum),
        "adafactor": _ADAFACTOR,
        **(_ONLY_ON_CUDA if every else _ONLY_ON_CPU),
    }
    if kind not in known:
        raise UnknownNameError("optimizer", kind, known, f"(no bytes are known of it under engine torch on {device})")
    return known[kind]


def handed_to_deepspeed(kind: str, device: str, momentum: float) -> TorchOptimizer:
    """As ``torch_optimizer``, where DeepSpeed looks the kind up in torch.optim: another Adafactor
    (torch/optim/_adafactor.py: the update of the parameter before, then the estimate of the one in hand)."""
    if kind == "adafactor":
        return TorchOptimizer(slots=1, one_by_one=((1, 1),), factored=True)
    return torch_optimizer(kind, device, momentum)


def _sgd(foreach: bool, momentum: float) -> TorchOptimizer:
    """torch/optim/sgd.py: weight decay makes ``grad + decay * param``, which is let go of before the next; with
    momentum its buffer is a clone of the first."""
    if foreach:
        return TorchOptimizer(slots=int(momentum > 0), at_once=1)
    return TorchOptimizer(slots=int(momentum > 0), one_by_one=((0, 1),), made_in_turn=True)


@dataclass(frozen=True, slots=True)
class Steps:
    """An optimizer's bytes for groups of parameters of these shapes, in its order, of ``width`` bytes an element.

    Groups are updated one after the other, and a group's slots come to be with its first update
    (torch/optim/adam.py, ``Adam.step``).
    """

    optimizer: TorchOptimizer
    groups: tuple[tuple[Numels, ...], ...]
    width: int

    @property
    def params(self) -> Iterator[Numels]:
        """Of all groups."""
        return itertools.chain.from_iterable(self.groups)

    @property
    def state_bytes(self) -> int:
        """What is kept on the device between steps."""
        if self.optimizer.named:
            every = optimizer_bytes(self.optimizer.named, "cuda").state_bytes(*(numel for numel, _ in self.params))
        else:
            every = sum(self._slots(param) for param in self.params)
        return every - self.paged_bytes

    @property
    def paged_bytes(self) -> int:
        """What is kept in memory that the driver may keep on the host."""
        if not self.optimizer.paged:
            return 0
        width = 1 if self.optimizer.named else FP32
        return self.optimizer.slots * width * sum(numel for numel, _ in self.params if numel >= PAGED_NUMEL)

    def highest(self, first: bool) -> tuple[int, int]:
        """Bytes of states and of temporaries at the highest instant of a step; ``first``: of the first."""
        return max(self._instants(first), key=sum)

    def _instants(self, first: bool) -> Iterator[tuple[int, int]]:
        states = self.state_bytes
        made = before = 0
        for group in self.groups:
            if not self.optimizer.over_groups:
                before = 0
            if not self.optimizer.made_in_turn:
                made += sum(self._slots(param) for param in group)
            if not self.optimizer.one_by_one:
                scratch = self.optimizer.at_once * self._width * sum(numel for numel, _ in group)
                yield (min(made, states) if first else states), scratch
                continue
            for param in group:
                if self.optimizer.made_in_turn:
                    made += self._slots(param)
                scratch = max(left * before + own * param[0] for left, own in self._pairs) * self._width
                yield (made if first else states), scratch
                before = param[0]

    @property
    def _pairs(self) -> tuple[tuple[int, int], ...]:
        low = self.optimizer.fp32 and self.width < FP32 and self.optimizer.low_one_by_one
        return low or self.optimizer.one_by_one

    @property
    def _width(self) -> int:
        return FP32 if self.optimizer.fp32 else self.width

    def _slots(self, param: Numels) -> int:
        numel, factored = param
        if self.optimizer.named:
            return optimizer_bytes(self.optimizer.named, "cuda").tensor_bytes(numel)
        return self.optimizer.slots * (factored if self.optimizer.factored else numel) * self._width
