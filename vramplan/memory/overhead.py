"""What the driver counts beyond tensors. Nobody has measured these with this project: every one is ASSUMED.

Sources: the CUDA context took 0.47 to 0.92 GiB and NCCL's first collective about 1.5 GiB more in the measurements of
ml-engineering (S. Bekman); cuBLAS keeps 32 MiB a handle and stream on Hopper, 8.125 MiB before
(aten/src/ATen/cuda/CublasHandlePool.cpp, ``parseChosenWorkspaceSize``); the caching allocator rounds blocks to 2 MiB
and keeps what it has freed (c10/cuda/CUDACachingAllocator.cpp).
"""

from __future__ import annotations

from vramplan.facts.device import Device
from vramplan.memory.term import Basis, Category, Term
from vramplan.units import MIB

CONTEXT_BYTES = 942 * MIB
NCCL_BYTES = 1536 * MIB
HOPPER = (9, 0)
FRAGMENTATION_PER_MILLE = 30


def overhead(device: Device, world_size: int, allocated_bytes: int) -> tuple[Term, ...]:
    """Terms of one rank on a GPU beyond ``allocated_bytes`` of tensors; none on the CPU."""
    if device.kind == "cpu":
        return ()
    hopper = device.compute_capability is not None and device.compute_capability >= HOPPER
    terms = [
        _term("device context", CONTEXT_BYTES, "upper end of 0.47 to 0.92 GiB seen by ml-engineering"),
        _term("cuBLAS workspace", 32 * MIB if hopper else 9 * MIB, "CublasHandlePool.cpp, one handle and stream"),
        _term(
            "allocator fragmentation",
            allocated_bytes * FRAGMENTATION_PER_MILLE // 1000,
            "3% of allocated bytes: blocks rounded to 2 MiB and kept when freed; a guess, not measured",
        ),
    ]
    if world_size > 1:
        terms.append(_term("communicators", NCCL_BYTES, "NCCL's buffers after the first collective, ml-engineering"))
    return tuple(terms)


def _term(name: str, num_bytes: int, note: str) -> Term:
    return Term(name, num_bytes, Category.OVERHEAD, Basis.ASSUMED, note)
