"""What a rank that runs out of memory leaves behind, and how out-of-memory is told from other errors. No torch."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vramplan.units import parse_bytes

OUT_OF_MEMORY_EXIT_CODE = 86
"""Exit code of a rank that ran out of memory and said so (the next one, 87, is that of a rank without a supervisor)."""

_DRIVERS_TEXT = "CUDA error: out of memory"
_HOST_TEXTS = (
    "DefaultCPUAllocator: can't allocate memory",
    "std::bad_alloc",
    "Cannot allocate memory",  # ENOMEM of mmap, fork and thread creation
    "can't start new thread",  # pthread_create, whose stack does not fit
)
_PRIMITIVE = re.compile("could not create a primitive(?! descriptor)")
"""oneDNN's words where there is no memory for a kernel's code or scratch (``dnnl_out_of_memory``; seen of bf16 products
on the CPU under RLIMIT_DATA). What it does not implement it refuses before, as it makes the descriptor."""
_PINNING = ("pin_memory()", "pin_memory=True")
"""Calls by which the driver is asked for the host's memory (deepspeed/accelerator/abstract_accelerator.py:275-279); it
refuses that in the words in which it refuses its own."""
_TEXTS = (
    "CUDA out of memory",  # the caching allocator
    _DRIVERS_TEXT,
    "CUDA driver error: out of memory",  # its own interface, which maps expandable segments (c10/cuda/driver_api.h)
    "CUBLAS_STATUS_ALLOC_FAILED",  # a workspace of cuBLAS
    "'out of memory'",  # NCCL: Cuda failure 2 'out of memory'
    *_HOST_TEXTS,
)
_KINDS = ("OutOfMemoryError", "MemoryError")
_REQUESTED = re.compile(r"(?:tried|unable) to allocate (\d+(?:\.\d+)?)\.? ?(bytes|[KMGT]iB)", re.IGNORECASE)


def is_out_of_memory(kind: str, message: str) -> bool:
    """By the type that torch or Python raises, and by the texts of what is raised as a plain RuntimeError."""
    return kind in _KINDS or any(text in message for text in _TEXTS) or _PRIMITIVE.search(message) is not None


def is_of_kernel(message: str) -> bool:
    """Whether oneDNN had no memory for a kernel. It then fails in the same process with memory to spare too (seen with
    an eighth of the micro-batch and 600 MiB free), so that only a fresh one helps."""
    return _PRIMITIVE.search(message) is not None


def is_of_host(kind: str, message: str, traceback: str = "") -> bool:
    """Whether an out-of-memory is of the host's memory: of its allocators, or of pages that were to be pinned, which
    the last line of code in the traceback tells."""
    if kind == "MemoryError" or any(text in message for text in _HOST_TEXTS) or _PRIMITIVE.search(message):
        return True
    code = [line for line in traceback.splitlines() if line.startswith("    ") and line.strip(" ^~")]
    return _DRIVERS_TEXT in message and any(call in line for line in code[-1:] for call in _PINNING)


def requested_bytes(message: str) -> int | None:
    """The size of the allocation that failed, as torch's texts give it (CPUAllocator, CUDACachingAllocator)."""
    found = _REQUESTED.search(message)
    return None if found is None else parse_bytes(f"{found[1]} {found[2].replace('bytes', 'B')}")


@dataclass(frozen=True, slots=True)
class MemoryState:
    """Bytes of one rank at the moment of its failure; None where the device does not tell.

    On CUDA ``allocated`` is what tensors hold, ``reserved`` what the caching allocator holds, ``free`` what the driver
    has left. On the CPU ``reserved`` is the growth of the process's data since before the model was loaded, and
    ``free`` what its limit (RLIMIT_DATA), its control group or the machine leaves.
    """

    requested: int | None = None
    allocated: int | None = None
    reserved: int | None = None
    free: int | None = None

    @property
    def capacity(self) -> int | None:
        """The most that tensors could have held in this process: what the allocator holds and what is free."""
        return None if self.reserved is None or self.free is None else self.reserved + self.free

    @property
    def held(self) -> int | None:
        """What tensors hold, or on the CPU about that."""
        return self.reserved if self.allocated is None else self.allocated

    @property
    def needed(self) -> int | None:
        """Bytes that the run needs at this moment at least: what is held, and what was asked for on top."""
        return None if self.held is None else self.held + (self.requested or 0)

    @property
    def is_fragmented(self) -> bool:
        """Whether the allocator held enough unused bytes for the request, in pieces."""
        if self.requested is None or self.allocated is None or self.reserved is None:
            return False
        return self.reserved - self.allocated >= self.requested


@dataclass(frozen=True, slots=True)
class Marker:
    """What a rank wrote when it ended; ``by_user``: its message is a sentence for the user as it stands."""

    rank: int
    phase: str
    kind: str
    message: str
    by_user: bool
    exit_code: int
    time: float
    step: int = 0
    """Counts from 1; 0 outside the steps, as ``micro``."""
    micro: int = 0
    plan: str = ""
    """``search.plan.plan_id`` of the plan that was run."""
    device: str = ""
    """Kind of the device on which that plan's tensors lie (``facts.device.Device.kind``)."""
    memory: MemoryState | None = None
    """Of a rank that ran out of it."""
    shapes: tuple[tuple[int, ...], ...] = ()
    """Of the micro-batch's tensors."""
    samples: tuple[int, ...] = ()
    """Ids of the micro-batch's samples."""
    traceback: str = ""

    @property
    def is_out_of_memory(self) -> bool:
        """Told by what was raised."""
        return is_out_of_memory(self.kind, self.message)

    @property
    def is_of_host(self) -> bool:
        """Whether the host's memory ran out although tensors lie on a device of their own."""
        return self.device not in ("", "cpu") and is_of_host(self.kind, self.message, self.traceback)

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)

    @classmethod
    def read(cls, path: Path) -> Marker:
        """The marker of a file.

        Raises:
            ValueError, KeyError, TypeError: the file is not whole.
        """
        raw: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        known = {name: raw[name] for name in cls.__dataclass_fields__ if name in raw}
        if known.get("memory") is not None:
            known["memory"] = MemoryState(**known["memory"])
        known["shapes"] = tuple(tuple(shape) for shape in known.get("shapes", ()))
        known["samples"] = tuple(known.get("samples", ()))
        return cls(**known)
