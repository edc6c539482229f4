"""What of torch, transformers and DeepSpeed has to stand aside for fake tensors, and is put back afterwards."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch._subclasses import FakeTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import _disable_current_modes

from vramplan.simulate.cuda_attention import cuda_attention
from vramplan.simulate.cuda_autocast import cuda_autocast
from vramplan.simulate.many_ranks import few_views
from vramplan.simulate.no_disk import NoDiskBuilder
from vramplan.simulate.request import Conditions
from vramplan.simulate.tracker import Tracker

CPU_RNG_STATE_BYTES = 5056
"""Size of ``torch.get_rng_state()``: a Mersenne twister's state (aten/src/ATen/CPUGeneratorImpl.cpp)."""


def _answer_as_cuda(tracker: Tracker, put: Callable[..., None]) -> None:
    """What goes other ways on a GPU than the fakes' device would."""
    import deepspeed.runtime.chunked_cross_entropy as chunked_loss

    # torch's optimizers take plain tensors on a GPU all at once, and fakes stand for plain tensors
    put(
        sys.modules["torch.optim.optimizer"],
        "_foreach_supported_types",
        [torch.Tensor, torch.nn.Parameter, FakeTensor],
    )
    put(FakeTensor, "data", property(_DATA.__get__, _set_data))
    autocast = cuda_autocast(tracker.device_type)
    autocast.clear()  # of a trace before
    put(torch, "clear_autocast_cache", autocast.clear)
    put(torch, "is_autocast_enabled", _autocast_enabled_on(tracker.device_type))
    put(torch.nn.functional, "softmax", _widening_inside(torch.nn.functional.softmax))
    put(chunked_loss, "_resolve_backend", lambda *_: "triton")
    for name in ("_log_sum_exp_forward_kernel", "_cross_entropy_backward_kernel"):
        put(chunked_loss, name, _NoTriton(), create=True)
    put(torch.nn.functional, "scaled_dot_product_attention", autocast.lowered(cuda_attention))


@contextmanager
def patched(tracker: Tracker, conditions: Conditions, device_type: str, *, packed: bool = False) -> Iterator[None]:
    """Everything below, for the duration of the context; ``packed``: positions restart within a sequence."""
    import deepspeed.ops.adam.cpu_adam as cpu_adam
    import deepspeed.ops.adam.fused_adam as fused_adam
    import deepspeed.runtime.swap_tensor.partitioned_optimizer_swapper as optimizer_swapper
    import deepspeed.runtime.swap_tensor.partitioned_param_swapper as param_swapper
    import deepspeed.runtime.zero.partitioned_param_coordinator as coordinator
    import deepspeed.runtime.zero.stage3 as stage3
    import deepspeed.runtime.zero.utils as zero_utils
    import transformers.masking_utils as masking_utils
    import transformers.modeling_utils as modeling_utils

    with ExitStack() as stack:
        stack.enter_context(few_views())
        # Muon's update is compiled (runtime/zero/muon/original_muon.py), which fakes do not bear: it runs as written
        stack.enter_context(torch.compiler.set_stance("force_eager"))

        def put(owner: Any, name: str, value: Any, create: bool = False) -> None:
            stack.enter_context(mock.patch.object(owner, name, value, create=create))

        put(torch.nn.Module, "_apply", _apply_by_data)
        put(torch.nn.Module, "__call__", _call_seen_by(tracker))
        put(FakeTensor, "__deepcopy__", _copied_as_a_parameter)
        put(torch, "get_rng_state", _rng_state)
        put(torch, "set_rng_state", lambda state: None)
        put(torch.distributed.device_mesh, "init_device_mesh", _on_real_tensors(_init_device_mesh()))
        put(torch, "bincount", _bincount)
        put(torch.Tensor, "record_stream", lambda self, stream: None)
        # what rank 0 sends it hears itself; AutoTP compares a batch so, and a fake cannot be pickled
        put(torch.distributed, "broadcast_object_list", lambda *args, **kwargs: None)
        put(DistributedDataParallel, "_pre_forward", _keeping_buckets(DistributedDataParallel._pre_forward))
        put(fused_adam, "FusedAdamBuilder", _NoKernel)
        put(cpu_adam, "CPUAdamBuilder", _NoKernel)
        for swapper in (param_swapper, optimizer_swapper):
            put(swapper, "AsyncIOBuilder", NoDiskBuilder)
        put(zero_utils, "assert_lst_len_same_as_other_ranks", _length_from_rank0)
        put(zero_utils, "get_lst_from_rank0", _list_from_rank0)
        # A mask is kept or dropped by its values, as in a real run: no graph is being traced here.
        put(masking_utils, "is_tracing", lambda tensor=None: False)
        put(modeling_utils, "is_tracing", lambda tensor=None: False)
        # The order of a set of parameters depends on their addresses; any is as real as another.
        put(coordinator, "set", _SetInOrder, create=True)
        parameters = coordinator.PartitionedParameterCoordinator
        put(parameters, "_fetch_sub_module_impl", _noting_available(tracker, parameters._fetch_sub_module_impl))
        put(masking_utils, "fast_all", _yes_after(masking_utils.fast_all, said=not conditions.padded))
        if packed:
            put(masking_utils, "find_packed_sequence_indices", _found_in(masking_utils.find_packed_sequence_indices))
        if device_type == "cuda":
            _answer_as_cuda(tracker, put)
        if conditions.skip_steps:
            put(stage3, "is_invalid_grad_norm", _yes_after(stage3.is_invalid_grad_norm))
        yield


def _autocast_enabled_on(device_type: str) -> Callable[..., bool]:
    """``torch.is_autocast_enabled``, which without an argument asks of CUDA: here of the device that stands for it."""
    ask = torch.is_autocast_enabled
    return lambda asked=device_type: ask(asked)


def _keeping_buckets(pre_forward: Callable[..., Any]) -> Callable[..., Any]:
    """DDP's ``_pre_forward`` without new buckets in the order of backward, which ranks agree on by values; they would
    take as many bytes as the first ones."""

    def kept(self: DistributedDataParallel, *inputs: Any, **kwargs: Any) -> Any:
        with mock.patch.object(self, "reducer", _KeptBuckets(self.reducer)):
            return pre_forward(self, *inputs, **kwargs)

    return kept


def _widening_inside(softmax: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """``softmax``, which on CUDA takes fp16 to fp32 within its kernel (SoftMax.cpp asks ``is_cuda``)."""

    def widened(input: torch.Tensor, dim: int | None = None, *args: Any, **kwargs: Any) -> torch.Tensor:
        if input.dtype is torch.float16 and kwargs.get("dtype") is torch.float32 and input.device.type != "cpu":
            wide: torch.Tensor = torch.ops.aten._softmax.default(input, -1 if dim is None else dim, True)
            return wide
        return softmax(input, dim, *args, **kwargs)

    return widened


class _KeptBuckets:
    """DDP's reducer, whose buckets stay."""

    def __init__(self, reducer: Any) -> None:
        self._reducer = reducer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reducer, name)

    def _rebuild_buckets(self) -> bool:
        return False


def _yes_after(question: Callable[..., Any], *, said: bool = True) -> Callable[..., bool]:
    """``question`` with its work done and its answer as ``said``."""

    def answered(*args: Any, **kwargs: Any) -> bool:
        question(*args, **kwargs)
        return said

    return answered


def _found_in(find: Callable[[torch.Tensor], Any]) -> Callable[[torch.Tensor], Any]:
    """``find_packed_sequence_indices``, which by the values that a fake has not would see a single document."""
    from transformers import masking_utils

    def found(position_ids: torch.Tensor) -> Any:
        with mock.patch.object(masking_utils, "is_tracing", return_value=True):
            return find(position_ids)

    return found


def _apply_by_data(self: torch.nn.Module, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
    """``Module._apply`` as it goes for real tensors: through ``.data``. For fakes torch would swap whole objects,
    and refuses where a weak reference to one exists."""
    if recurse:
        for child in self.children():
            child._apply(fn)
    for param in self._parameters.values():
        if param is None:
            continue
        with torch.no_grad():
            param.data = fn(param)
            if param.grad is not None:
                param.grad.data = fn(param.grad)
    for name, buffer in self._buffers.items():
        if buffer is not None:
            self._buffers[name] = fn(buffer)
    return self


def _copied_as_a_parameter(tensor: torch.Tensor, memo: dict[int, Any]) -> torch.Tensor:
    """``copy.deepcopy`` of a parameter (torch/nn/parameter.py), as PEFT copies modules to be saved: the values alone,
    where torch would take a fake's storage and every mark that DeepSpeed left on it."""
    made = tensor.detach().clone(memory_format=torch.preserve_format).requires_grad_(tensor.requires_grad)
    if isinstance(tensor, torch.nn.Parameter):
        made._is_param = True
    memo[id(tensor)] = made  # ``copy.deepcopy`` asks there first
    return made


def _set_data(tensor: torch.Tensor, other: torch.Tensor) -> None:
    """``tensor.data = other``; for fakes of different devices torch refuses that, so the two change their insides."""
    if tensor.device.type == other.device.type:
        _DATA.__set__(tensor, other)
    elif other is not tensor:
        other = other.detach().requires_grad_(tensor.requires_grad)
        hooks = tensor._post_accumulate_grad_hooks  # of springs, made before the engine moves the model
        torch._C._swap_tensor_impl(tensor, other)
        if hooks is not None:
            tensor._post_accumulate_grad_hooks = hooks
        # what makes it a parameter, and DeepSpeed's own marks, stay with the object
        tensor.__dict__, other.__dict__ = {**tensor.__dict__, **other.__dict__}, tensor.__dict__


_DATA: Any = torch._C.TensorBase.data


def _call_seen_by(tracker: Tracker) -> Callable[..., Any]:
    call = torch.nn.Module.__call__

    def seen_call(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        # the fake mode sets it in its own thread; recomputation runs in the device's, where an index would be real
        torch._C._set_only_lift_cpu_tensors(True)
        with tracker.inside(self):
            return call(self, *args, **kwargs)

    return seen_call


class _SetInOrder(set[Any]):
    """A set of ZeRO-3's parameters, or of their numbers, that is gone through in the order of the numbers."""

    def __iter__(self) -> Iterator[Any]:
        return iter(sorted(set.__iter__(self), key=lambda item: getattr(item, "ds_id", item)))


def _noting_available(tracker: Tracker, fetch: Callable[..., None]) -> Callable[..., None]:
    """``fetch``; elements that ZeRO-3 counts as gathered, by which it decides what to prefetch, are noted before."""

    def noting_fetch(self: Any, *args: Any, **kwargs: Any) -> None:
        if self.is_complete_trace():
            tracker.note("available", self._PartitionedParameterCoordinator__n_available_params)
        fetch(self, *args, **kwargs)

    return noting_fetch


def _bincount(input: torch.Tensor, weights: torch.Tensor | None = None, minlength: int = 0) -> torch.Tensor:
    """Counts of values below ``minlength``, as where experts are counted; how many there are decides no value."""
    if weights is not None or minlength == 0:
        raise NotImplementedError("torch.bincount makes as many counts as its largest value says, which a fake has not")
    return input.new_zeros(minlength, dtype=torch.int64)


def _rng_state() -> torch.Tensor:
    """What checkpointing stores of the CPU's generator: as many bytes, without the state."""
    return torch.empty(CPU_RNG_STATE_BYTES, dtype=torch.uint8, device="cpu")


def _init_device_mesh() -> Callable[..., Any]:
    from torch.distributed import device_mesh

    return device_mesh.init_device_mesh


def _on_real_tensors(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` where tensors have values: a mesh reads its ranks from one."""

    def real(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            return function(*args, **kwargs)

    return real


def _length_from_rank0(lst: list[int]) -> None:
    """As DeepSpeed's, with the tensor that it sends; after a fake broadcast its value would be unknown."""
    _from_rank0(len(lst))


def _list_from_rank0(lst: list[int]) -> list[int]:
    """As DeepSpeed's, with the tensor that it sends; rank 0 hears its own list."""
    _from_rank0(lst)
    return lst


def _from_rank0(value: int | list[int]) -> None:
    from deepspeed import comm
    from deepspeed.accelerator import get_accelerator

    device = torch.device(get_accelerator().current_device_name())
    comm.broadcast(torch.tensor(value, dtype=torch.int64, device=device, requires_grad=False), src=0, async_op=False)


class _NoTriton:
    """Stands for a Triton kernel, which is called as ``kernel[grid](...)`` and writes to what it is given."""

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *_, **__: None


class _NoKernel:
    """Stands for DeepSpeed's compiled FusedAdam and CPUAdam: they work in place on raw addresses, and allocate
    nothing."""

    def load(self) -> _NoKernel:
        return self

    @staticmethod
    def multi_tensor_adam(*_: Any) -> None:
        """Updates in place."""

    create_adam = adam_update = adam_rollback = destroy_adam = multi_tensor_adam
