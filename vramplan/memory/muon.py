"""Muon as DeepSpeed has it: which parameters it updates, and what an update makes besides (deepspeed 0.19.8,
runtime/zero/muon/original_muon.py; deepspeed/__init__.py, ``set_optimizer_flags``).

Matrices have their momentum and no second moment; vectors, embeddings and heads are left to FusedAdam. The update is
counted operator by operator, as it is written. On a GPU torch compiles it, and what the compiler fuses is not counted:
ASSUMED, and no less than what runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from vramplan.facts.dtype import Dtype

Shape = tuple[int, ...]
ADAM_BYTES = 8
"""FusedAdam's two fp32 moments of an element."""


def takes_muon(name: str, shape: Shape) -> bool:
    """Whether Muon updates a parameter: one with rows and columns, whose name has neither of two words
    (``set_optimizer_flags``)."""
    return len(shape) >= 2 and not any(word in name.lower() for word in ("embed", "lm_head"))


def update_bytes(shape: Shape, dtype: Dtype, device: str) -> int:
    """The most that ``muon_update`` has beside a gradient of that shape and format and its momentum, its result
    included, in bytes.

    A gradient is compared (``isfinite``: two masks, their product and the absolute values), mixed with the momentum
    (``lerp``, ``where``), normed, in fp32 where it is fp16, and cast to the format of the iteration: fp16, on a CPU
    without it fp32 (``ns_compute_dtype``). The result is cast back and chosen by ``where``.
    """
    numel, width = prod(shape), dtype.nbytes
    computed = Dtype.FP16 if device == "cuda" else Dtype.FP32
    normed = Dtype.FP32 if dtype is Dtype.FP16 else dtype
    copy = numel * normed.nbytes if normed is not dtype else 0
    cast = numel * computed.nbytes if computed is not normed else 0
    back = numel * computed.nbytes if computed is not dtype else 0
    return max(
        numel * (width + 3),
        2 * numel * width,
        copy + numel * normed.nbytes + cast,
        _iteration_numel(shape) * computed.nbytes,
        numel * width + max(back, numel * width),
    )


def _iteration_numel(shape: Shape) -> int:
    """Elements of the iteration at its highest (``zeropower_via_gram_newtonschulz``, five steps).

    A square: X, A, B, and the scaled X, the product and their sum. Else the Gram matrix R, Z, Q and RZ of the shorter
    side beside X and the three parts of the sum in hand, or beside the old and the new X.
    """
    numel = prod(shape)
    gram = prod(shape[:-2]) * min(shape[-2:]) ** 2
    if shape[-1] == shape[-2]:
        return 6 * numel
    return max(numel + 7 * gram, 2 * numel + 4 * gram)


@dataclass(frozen=True, slots=True)
class MuonSteps:
    """Muon's bytes where every parameter has fp32 weights and gradients of its own (muon_optimizer.py,
    ``MuonWithAuxAdam.step``): matrices one by one, then all others at once."""

    matrices: tuple[Shape, ...]
    others_numel: int
    """Elements of the parameters that FusedAdam updates."""
    device: str

    @property
    def state_bytes(self) -> int:
        """What is kept on the device between steps."""
        momentum = sum(prod(shape) for shape in self.matrices) * Dtype.FP32.nbytes
        return momentum + self.others_numel * ADAM_BYTES

    @property
    def paged_bytes(self) -> int:
        """What lies in memory that the driver may keep on the host: nothing."""
        return 0

    def highest(self, first: bool) -> tuple[int, int]:
        """Bytes of states and of temporaries at the highest instant of a step; ``first``: of the first."""
        return max(self._instants(first), key=sum)

    def _instants(self, first: bool) -> Iterator[tuple[int, int]]:
        """The last update stays until the next is made (``update``)."""
        made = last = 0
        for shape in self.matrices:
            numel = prod(shape) * Dtype.FP32.nbytes
            made += numel
            yield made if first else self.state_bytes, last + update_bytes(shape, Dtype.FP32, self.device)
            last = numel
        yield self.state_bytes, last
