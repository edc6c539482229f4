"""NVIDIA GPUs of this machine as the driver sees them, by NVML and without torch.

Structures and names: ``nvml.h`` of the CUDA toolkit. A machine without the library or without a GPU has no GPUs; that
is an answer, not an error.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

_LIBRARIES = ("libnvidia-ml.so.1", "libnvidia-ml.so", "nvml.dll")
_NAME_LENGTH = 96  # NVML_DEVICE_NAME_V2_BUFFER_SIZE
_VERSION_LENGTH = 80  # NVML_SYSTEM_DRIVER_VERSION_BUFFER_SIZE


class _Memory(ctypes.Structure):
    """``nvmlMemory_t``: total counts what the driver keeps for itself."""

    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


class _MemoryV2(ctypes.Structure):
    """``nvmlMemory_v2_t``: the same with the driver's own share apart."""

    _fields_ = (
        ("version", ctypes.c_uint),
        ("total", ctypes.c_ulonglong),
        ("reserved", ctypes.c_ulonglong),
        ("free", ctypes.c_ulonglong),
        ("used", ctypes.c_ulonglong),
    )


@dataclass(frozen=True, slots=True)
class LocalGpu:
    """One visible GPU. ``usable_bytes``: total less what the driver reserves, which is what CUDA reports as total."""

    index: int
    name: str
    memory_bytes: int
    usable_bytes: int
    free_bytes: int
    compute_capability: tuple[int, int]


@dataclass(frozen=True, slots=True)
class NvidiaDriver:
    """The driver and the GPUs that this process may use."""

    version: str
    gpus: tuple[LocalGpu, ...]


def read_driver(environ: Mapping[str, str] = os.environ) -> NvidiaDriver | None:
    """The NVIDIA driver of this machine with the GPUs that ``CUDA_VISIBLE_DEVICES`` shows; None without a driver."""
    with _nvml() as library:
        if library is None:
            return None
        version = ctypes.create_string_buffer(_VERSION_LENGTH)
        library.nvmlSystemGetDriverVersion(version, ctypes.c_uint(_VERSION_LENGTH))
        handles = _visible_handles(library, environ.get("CUDA_VISIBLE_DEVICES"))
        gpus = tuple(_read_gpu(library, index, handle) for index, handle in handles)
        return NvidiaDriver(version.value.decode(), gpus)


@contextmanager
def _nvml() -> Iterator[ctypes.CDLL | None]:
    """The initialised library, or None where there is none or it finds no driver."""
    library = _load_library()
    if library is None or library.nvmlInit_v2() != 0:
        yield None
        return
    try:
        yield library
    finally:
        library.nvmlShutdown()


def _load_library() -> ctypes.CDLL | None:
    for name in _LIBRARIES:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


def _visible_handles(library: ctypes.CDLL, visible: str | None) -> list[tuple[int, ctypes.c_void_p]]:
    """Handles in the order of ``CUDA_VISIBLE_DEVICES``; as in CUDA, an entry that is no device ends the list."""
    count = ctypes.c_uint()
    if library.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0:
        return []
    wanted = [str(index) for index in range(count.value)] if visible is None else visible.split(",")
    handles = []
    for index, entry in enumerate(wanted):
        handle = ctypes.c_void_p()
        if entry.strip().isdigit():
            status = library.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(int(entry)), ctypes.byref(handle))
        else:
            status = library.nvmlDeviceGetHandleByUUID(entry.strip().encode(), ctypes.byref(handle))
        if status != 0:
            break
        handles.append((index, handle))
    return handles


def _read_gpu(library: ctypes.CDLL, index: int, handle: ctypes.c_void_p) -> LocalGpu:
    name = ctypes.create_string_buffer(_NAME_LENGTH)
    library.nvmlDeviceGetName(handle, name, ctypes.c_uint(_NAME_LENGTH))
    major, minor = ctypes.c_int(), ctypes.c_int()
    library.nvmlDeviceGetCudaComputeCapability(handle, ctypes.byref(major), ctypes.byref(minor))
    total, reserved, free = _read_memory(library, handle)
    return LocalGpu(index, name.value.decode(), total, total - reserved, free, (major.value, minor.value))


def _read_memory(library: ctypes.CDLL, handle: ctypes.c_void_p) -> tuple[int, int, int]:
    """Total, reserved by the driver, free. Drivers before 510 do not tell the reserved part: it is 0 then."""
    if hasattr(library, "nvmlDeviceGetMemoryInfo_v2"):
        newer = _MemoryV2(version=ctypes.sizeof(_MemoryV2) | (2 << 24))  # NVML_STRUCT_VERSION(Memory, 2)
        if library.nvmlDeviceGetMemoryInfo_v2(handle, ctypes.byref(newer)) == 0:
            return newer.total, newer.reserved, newer.free
    older = _Memory()
    library.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(older))
    return older.total, 0, older.free
