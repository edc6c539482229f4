"""Out of memory in a forward or backward, mended in the same process where that is safe: one rank, ZeRO 0 to 2.

Elsewhere peers may sit in a collective, or ZeRO-3 has weights in flight, and only a fresh process is clean. Here the
step's gradients and DeepSpeed's buckets are dropped, and the step is taken anew with micro-batches of half the size.
If then more is alive than was before the step, something of the failed pass is still held, and the process must end.
"""

from __future__ import annotations

import ctypes
import gc
from contextlib import suppress
from typing import Any

import torch

from vramplan.emit.deepspeed import managed_accumulation
from vramplan.measure.marker import is_of_kernel, is_out_of_memory
from vramplan.train.engine import TrainEngine

_FIRST_STEPS = 2
"""Steps of a launch before which what is alive still grows: the first makes the optimizer's states."""


class InPlace:
    """Whether a step may be taken anew, and what must not be alive then."""

    def __init__(self, engine: TrainEngine) -> None:
        self._engine = engine
        stage = engine.run.zero.stage or 0
        self.is_safe = engine.world_size == 1 and stage <= 2 and not managed_accumulation(engine.run)
        self._steps, self._alive = 0, 0

    def begin_step(self) -> None:
        """Notes what is alive between steps; where counting costs time, in the first steps only."""
        if self.is_safe and self._engine.device.type == "cuda":
            self._alive = torch.cuda.memory_allocated(self._engine.device)
        elif self.is_safe and self._steps < _FIRST_STEPS:
            self._alive = live_bytes(self._engine.device)
        self._steps += 1

    def may_retry(self, error: BaseException, micro_batch_size: int) -> bool:
        """Whether ``error`` is one that half the micro-batch may mend here."""
        kind, message = type(error).__name__, str(error)
        passes = is_out_of_memory(kind, message) and not is_of_kernel(message)
        return self.is_safe and micro_batch_size > 1 and passes

    def clean_up(self) -> int:
        """Drops what the failed pass left; bytes that are alive though they were not before the step.

        To be called where the exception is no more: its frames hold the activations.
        """
        drop_gradients(self._engine)
        alive = live_bytes(self._engine.device)
        if self._engine.device.type == "cuda":
            torch.cuda.empty_cache()
        else:
            give_back()
        return max(0, alive - self._alive)


def without_frames(error: Exception) -> tuple[type[Exception], str]:
    """The kind and the words of an out-of-memory, by which it can be raised again and told for what it is, without the
    frames that hold the failed pass. Python's own has no words (``MemoryError()``), and its name stands for them."""
    kinds = (MemoryError, torch.OutOfMemoryError)
    return next((kind for kind in kinds if isinstance(error, kind)), RuntimeError), str(error).strip() or repr(error)


def drop_gradients(engine: TrainEngine) -> None:
    """Makes the engine as it is between steps (DeepSpeed 0.19.8 has no call for it)."""
    for param in engine.module.parameters():
        param.grad = None
        if hasattr(param, "grad_accum"):
            param.grad_accum = None
    engine.deepspeed._unmanaged_backward_count = 0
    if engine.run.zero.stage:
        _reset_zero12(engine.deepspeed.optimizer)


def _reset_zero12(wrapped: Any) -> None:
    """All that ``DeepSpeedZeroOptimizer`` (zero/stage_1_and_2.py) changes between two steps, as ``step`` leaves it."""
    wrapped.exit_backward()
    wrapped.clear_backward_seen_flag()
    for bucket in wrapped.ipg_buckets.values():
        bucket.clear()
    wrapped._release_ipg_buffers()
    wrapped.reset_partition_gradient_structures()
    wrapped.params_already_reduced = [False] * len(wrapped.params_already_reduced)
    for kept in (wrapped.averaged_gradients, wrapped.all_grad_tensors):
        kept.update(dict.fromkeys(kept))
    for params in wrapped.previous_reduced_grads.values():
        params.clear()
    wrapped.micro_step_id = -1  # INITIAL_MICRO_STEP_ID
    if wrapped.cpu_offload:
        wrapped.accumulated_grads_in_cpu.clear()
        wrapped.norm_for_param_grads.clear()
        wrapped.local_overflow = False


def give_back() -> None:
    """What the C library keeps of freed memory goes back to the system (malloc_trim(3), glibc's own): the next pass
    asks for other sizes, and pieces of the failed one's would count beside them."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def live_bytes(device: torch.device) -> int:
    """Bytes of tensors: what CUDA's allocator counts; on the CPU, which counts nothing, those that Python can see."""
    gc.collect()
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    storages = {}
    for each in gc.get_objects():
        if issubclass(type(each), torch.Tensor):
            storage = each.untyped_storage()
            if storage.device.type == "meta":  # no memory; torch's compiler keeps such ones (Muon's step is compiled)
                continue
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
