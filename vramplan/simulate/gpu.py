"""A GPU that is not there: a device type of torch's and an accelerator of DeepSpeed's that take CUDA's paths.

torch lets one more device type be registered from Python (PrivateUse1). Fake tensors on it are told from those on the
host, autograd runs on it, and DeepSpeed is given an accelerator that answers as CUDA's does: streams that overlap,
events, pinned memory, NCCL. Set up once in a process, before its process group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator

NAME = "gpu"
"""The device type's name; ``cuda`` itself needs a CUDA build of torch."""
CUDA_RNG_STATE_BYTES = 16
"""Size of ``torch.cuda.get_rng_state()``: a seed and an offset (aten/src/ATen/cuda/CUDAGeneratorImpl.cpp)."""
BOUNDLESS_BYTES = 2**50
"""What the device says it has: the capacity is judged by the replay, not here."""


class FakeStream:
    """A stream that DeepSpeed makes; its number goes into the births on it."""

    def __init__(self, device: Any = None, priority: int = 0, *, number: int | None = None, **_: Any) -> None:
        self.number = number if number is not None else _next_number()

    def wait_stream(self, other: Any) -> None:
        """Nothing runs, so nothing waits."""

    def wait_event(self, event: Any) -> None:
        """Nothing runs, so nothing waits."""

    def synchronize(self) -> None:
        """Nothing runs, so nothing waits."""

    def record_event(self, event: Any = None) -> FakeEvent:
        return event or FakeEvent()

    def query(self) -> bool:
        return True


class FakeEvent:
    """An event that has happened."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def record(self, stream: Any = None) -> None:
        """Has happened."""

    def wait(self, stream: Any = None) -> None:
        """Has happened."""

    def synchronize(self) -> None:
        """Has happened."""

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Any) -> float:
        return 1.0


DEFAULT_STREAM = FakeStream(number=0)


class DeviceModule:
    """What torch asks of ``torch.<device type>``."""

    Stream = FakeStream
    Event = FakeEvent

    def __init__(self) -> None:
        self.stream_now = DEFAULT_STREAM
        self.on_stream: Callable[[int], None] = lambda number: None
        self.on_empty_cache: Callable[[], None] = lambda: None
        self.on_pin: Callable[[torch.Tensor], None] = lambda tensor: None

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def set_device(self, device: Any) -> None:
        """There is one."""

    def device_count(self) -> int:
        return 1

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        """Values do not matter."""

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return torch.empty(CUDA_RNG_STATE_BYTES, dtype=torch.uint8, device="cpu")

    def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None:
        """Values do not matter."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def synchronize(self, device: Any = None) -> None:
        """Nothing runs."""

    def empty_cache(self) -> None:
        self.on_empty_cache()

    def current_stream(self, device: Any = None) -> FakeStream:
        return self.stream_now

    @contextmanager
    def stream(self, stream: FakeStream | None) -> Iterator[None]:
        before, self.stream_now = self.stream_now, stream or self.stream_now
        self.on_stream(self.stream_now.number)
        try:
            yield
        finally:
            self.stream_now = before
            self.on_stream(before.number)


class SimulatedGpu(CUDA_Accelerator):  # type: ignore[misc]  # DeepSpeed is untyped
    """DeepSpeed's CUDA accelerator over the registered device type."""

    def __init__(self, module: DeviceModule) -> None:
        self._name = NAME
        self._communication_backend_name = "nccl"
        self._compile_backend = "inductor"
        self._nvtx_domains: dict[Any, Any] = {}
        self._module = module

    def device_name(self, device_index: int | None = None) -> str:
        return NAME if device_index is None else f"{NAME}:{device_index}"

    def communication_backend_version(self) -> tuple[int, int, int]:
        return (2, 27, 0)

    def device(self, device_index: int | None = None) -> Any:
        return torch.device(NAME, device_index or 0)

    def set_device(self, device_index: int) -> None:
        pass

    def current_device(self) -> int:
        return 0

    def current_device_name(self) -> str:
        return f"{NAME}:0"

    def device_count(self) -> int:
        return 1

    def synchronize(self, device_index: int | None = None) -> None:
        pass

    def get_rng_state(self, device_index: int | None = None) -> torch.Tensor:
        return self._module.get_rng_state()

    def set_rng_state(self, new_state: torch.Tensor, device_index: int | None = None) -> None:
        pass

    def manual_seed(self, seed: int) -> None:
        pass

    def manual_seed_all(self, seed: int) -> None:
        pass

    def initial_seed(self) -> int:
        return 0

    @property
    def Stream(self) -> type[FakeStream]:  # noqa: N802 - DeepSpeed's name
        return FakeStream

    def stream(self, stream: FakeStream) -> Any:
        return self._module.stream(stream)

    def current_stream(self, device_index: int | None = None) -> FakeStream:
        return self._module.stream_now

    def default_stream(self, device_index: int | None = None) -> FakeStream:
        return DEFAULT_STREAM

    @property
    def Event(self) -> type[FakeEvent]:  # noqa: N802 - DeepSpeed's name
        return FakeEvent

    def empty_cache(self) -> None:
        self._module.empty_cache()

    def memory_allocated(self, device_index: int | None = None) -> int:
        return 0

    max_memory_allocated = reset_max_memory_allocated = memory_cached = max_memory_cached = memory_allocated
    reset_max_memory_cached = reset_peak_memory_stats = memory_reserved = max_memory_reserved = memory_allocated

    def memory_stats(self, device_index: int | None = None) -> dict[str, int]:
        return {}

    def total_memory(self, device_index: int | None = None) -> int:
        return BOUNDLESS_BYTES

    available_memory = total_memory

    def is_bf16_supported(self) -> bool:
        return True

    is_fp16_supported = is_available = is_triton_supported = is_bf16_supported

    def prefer_triton_grouped_mm(self) -> bool:
        return False

    def range_push(self, msg: str, domain: Any = None, category: Any = None) -> None:
        pass

    def range_pop(self, domain: Any = None) -> None:
        pass

    def lazy_call(self, callback: Callable[[], None]) -> None:
        callback()

    def is_current_stream_capturing(self) -> bool:
        return False

    def _torch_pin_memory(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy on the host, as pinning makes one; ``pin_memory`` of DeepSpeed's accelerators comes here."""
        return self._pinned(tensor.clone())

    def _torch_empty_pinned(self, tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        return self._pinned(tensor.new_empty(shape))

    def _torch_is_pinned(self, tensor: torch.Tensor) -> bool:
        return tensor.device.type == "cpu"

    def _pinned(self, tensor: torch.Tensor) -> torch.Tensor:
        self._module.on_pin(tensor)
        return tensor

    def on_accelerator(self, tensor: torch.Tensor) -> bool:
        return tensor.device.type == NAME


for _name, _dtype in {
    "BFloat16Tensor": torch.bfloat16,
    "ByteTensor": torch.uint8,
    "DoubleTensor": torch.double,
    "FloatTensor": torch.float,
    "HalfTensor": torch.half,
    "IntTensor": torch.int,
    "LongTensor": torch.long,
}.items():

    def _make(self: SimulatedGpu, dtype: torch.dtype = _dtype) -> Callable[..., torch.Tensor]:
        return lambda data: torch.tensor(data, dtype=dtype, device=f"{NAME}:0")

    setattr(SimulatedGpu, _name, property(_make))

_made: list[DeviceModule] = []
_libraries: list[torch.library.Library] = []
_numbers = iter(range(1, 2**30))


def set_up_gpu() -> DeviceModule:
    """Registers the device type and gives DeepSpeed the accelerator; the module through which torch reaches it."""
    if _made:
        return _made[0]
    import torch.distributed as dist
    from deepspeed.accelerator import set_accelerator
    from torch.testing._internal.distributed import fake_pg  # noqa: F401 - registers the backend
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    module = DeviceModule()
    _setup_privateuseone_for_python_backend(NAME, backend_module=module)
    dist.Backend.backend_capability["fake"].append(NAME)
    dist.Backend.default_device_backend_map[NAME] = "fake"
    set_accelerator(SimulatedGpu(module))
    _add_kernels()
    _made.append(module)
    return module


def _add_kernels() -> None:
    """Operators that are one kernel on CUDA, while a device type of our own gets their formula in many."""
    library = torch.library.Library("aten", "IMPL")
    for name in ("silu_backward", "mish_backward"):
        library.impl(name, lambda gradient, x: torch.empty_like(x), "PrivateUse1")
    _libraries.append(library)


def _next_number() -> int:
    return next(_numbers)
