"""Devices by name, the node that this process runs on (its GPUs, else its CPU), and the node that a spec asks for."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from vramplan.errors import AmbiguousNameError, SpecError, UnknownNameError
from vramplan.facts.device import Device, Node
from vramplan.facts.gpu_catalogue import all_devices, find_device, list_devices
from vramplan.units import parse_bytes

if TYPE_CHECKING:  # imported where this machine is looked at: a GPU of the catalogue needs neither
    from vramplan.facts.host import Host
    from vramplan.facts.nvml import LocalGpu, NvidiaDriver

__all__ = [
    "CPU_RANKS",
    "HardwareRequest",
    "all_devices",
    "cpu_node",
    "find_device",
    "list_devices",
    "local_device",
    "local_node",
    "resolve_node",
]

CPU_RANKS = 2
"""Ranks on a machine without a GPU: the fewest that exercise every collective."""


class HardwareRequest(Protocol):
    """What ``resolve_node`` reads of a spec (``vramplan.spec.run.HardwareSpec`` is one)."""

    @property
    def gpu(self) -> str | None: ...
    @property
    def gpus_per_node(self) -> int | None: ...
    @property
    def nodes(self) -> int: ...
    @property
    def memory_cap(self) -> str | int | None: ...
    @property
    def host_memory(self) -> str | int | None: ...
    @property
    def overhead(self) -> str | None: ...


def resolve_node(hardware: HardwareRequest) -> Node:
    """The nodes that a spec asks for: a GPU of the catalogue, ``cpu``, or this machine.

    A catalogue GPU without a number of them is one GPU, and its host's memory is unknown unless given.

    Raises:
        UnknownNameError, AmbiguousNameError: the GPU's name.
        SpecError: more GPUs than this machine has, or a size that is none.
    """
    cap, host_memory = (
        _size("hardware.memory_cap", hardware.memory_cap),
        _size("hardware.host_memory", hardware.host_memory),
    )
    if hardware.gpu is None:
        node = local_node(hardware.gpus_per_node)
    elif hardware.gpu.strip().lower() == "cpu":
        from vramplan.facts.host import read_host

        node = cpu_node(read_host(), hardware.gpus_per_node)
    else:
        node = Node(find_device(hardware.gpu), hardware.gpus_per_node or 1)
    return replace(
        node,
        num_nodes=hardware.nodes,
        memory_cap_bytes=cap,
        host_memory_bytes=host_memory or node.host_memory_bytes,
        overhead_file=hardware.overhead,
    )


def local_node(gpus_per_node: int | None = None, *, driver: NvidiaDriver | None = None) -> Node:
    """This machine: all its visible GPUs (or as many as asked for), else its CPU.

    ``driver``: what NVML said, if it was read already.
    """
    from vramplan.facts.host import read_host
    from vramplan.facts.nvml import read_driver

    driver = driver or read_driver()
    host = read_host()
    if driver is None or not driver.gpus:
        return cpu_node(host, gpus_per_node)
    found = len(driver.gpus)
    if gpus_per_node is not None and gpus_per_node > found:
        raise SpecError(
            f"hardware.gpus_per_node is {gpus_per_node} but this machine shows {found}; name the GPU "
            "(hardware.gpu, --gpu) to plan for another machine"
        )
    used = driver.gpus[: gpus_per_node or found]
    # Equal ranks need the room of the smallest card.
    smallest = min(used, key=lambda gpu: gpu.usable_bytes)
    return Node(local_device(smallest), len(used), host_memory_bytes=host.memory_bytes)


def local_device(gpu: LocalGpu) -> Device:
    """A GPU with the driver's own figures for its memory and the catalogue's for its speed, where it is there."""
    try:
        known = find_device(gpu.name)
    except (UnknownNameError, AmbiguousNameError):
        known = Device(gpu.name, "cuda", 0, 0, note="not in the catalogue: its speed is unknown")
    return replace(
        known,
        name=gpu.name,
        memory_bytes=gpu.memory_bytes,
        usable_bytes=gpu.usable_bytes,
        compute_capability=gpu.compute_capability,
        source="; ".join(filter(None, ("memory: this machine's driver (NVML)", known.source))),
    )


def cpu_node(host: Host, ranks: int | None = None) -> Node:
    """``ranks`` (2 unless given) processes on the CPU, each with an equal share of the host's memory.

    Raises:
        SpecError: this system does not say how much memory it has.
    """
    ranks = ranks or CPU_RANKS
    if host.memory_bytes is None:
        raise SpecError("this system does not say how much memory it has; give hardware.memory_cap and hardware.gpu")
    share = host.memory_bytes // ranks
    device = Device(
        name="CPU",
        kind="cpu",
        memory_bytes=host.memory_bytes,
        usable_bytes=share,
        source="/proc/meminfo and the control group's limit",
        note=f"{ranks} ranks share the host's memory equally",
    )
    return Node(device, ranks, host_memory_bytes=host.memory_bytes)


def _size(field: str, value: str | int | None) -> int | None:
    if value is None:
        return None
    try:
        size = parse_bytes(str(value))
    except ValueError as error:
        raise SpecError(f"{field}: {error}") from error
    if size < 1:
        raise SpecError(f"{field} is {value!r}; it must be more than 0 bytes")
    return size
