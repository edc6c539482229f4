"""A device that holds one rank, and the nodes that hold the devices."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, slots=True)
class Device:
    """One GPU (or, for ranks on a CPU, one rank's share of the machine).

    ``memory_bytes`` is what the driver reports in all; ``usable_bytes`` the most that torch can allocate or the
    context can use of it: the capacity that *used* bytes are compared with.
    """

    name: str
    kind: Literal["cuda", "rocm", "hpu", "cpu"]
    memory_bytes: int
    usable_bytes: int
    bf16_flops: float | None = None
    """Dense bf16 (else fp16) peak, FLOP/s; None where the device has no such unit or nobody published it."""
    fp32_flops: float | None = None
    memory_bandwidth: float | None = None
    """Bytes per second."""
    link_bandwidth: float | None = None
    """Bytes per second to the other devices of the node, both directions together (NVLink), else None."""
    compute_capability: tuple[int, int] | None = None
    source: str = ""
    note: str = ""
    raw: dict[str, object] = field(default_factory=dict, compare=False, hash=False, repr=False)


@dataclass(frozen=True, slots=True)
class Node:
    """``num_nodes`` equal machines of ``gpus_per_node`` equal devices each; one rank per device."""

    device: Device
    gpus_per_node: int
    num_nodes: int = 1
    host_memory_bytes: int | None = None
    """Memory of one machine's host; None where unknown (then host bytes are printed but not judged)."""
    memory_cap_bytes: int | None = None
    """A cap on one rank's bytes below what the device offers."""
    overhead_file: str | None = None
    """A calibrated file of what the driver and the allocator hold beyond tensors; None: the shipped one."""

    @property
    def world_size(self) -> int:
        return self.gpus_per_node * self.num_nodes

    @property
    def capacity_bytes(self) -> int:
        """Bytes that one rank may use."""
        if self.memory_cap_bytes is None:
            return self.device.usable_bytes
        return min(self.memory_cap_bytes, self.device.usable_bytes)
