"""Plain PyTorch behind the calls of DeepSpeed's engine: the loop of transformers' Trainer, on one device or under DDP.

Follows transformers 5.17 (trainer.py, ``training_step`` and ``_inner_training_loop``) and accelerate 1.15
(``prepare_model``, ``clip_grad_norm_``): forward and loss under autocast, no all-reduce before the last micro-batch of
a step, clipping, the optimizer's step, gradients set to None.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from vramplan.rank.optimizer import plain_optimizer
from vramplan.spec.run import RunSpec


class PlainEngine:
    """A model, its optimizer, and a count of micro-batches."""

    def __init__(self, run: RunSpec, model: torch.nn.Module, world_size: int, device: str) -> None:
        self.module = model
        self.run = run
        self.device_type = torch.device(device).type
        self.micro_batches = 0
        self.wrapped = _distributed(model) if world_size > 1 else model
        self.trainable = [param for param in model.parameters() if param.requires_grad]
        self.optimizer = plain_optimizer(run, self.trainable)

    @property
    def at_boundary(self) -> bool:
        """Whether the micro-batch in hand is the last of its step."""
        return (self.micro_batches + 1) % (self.run.grad_accum_steps or 1) == 0

    def __call__(self, **batch: Any) -> Any:
        """Forward and the model's own loss; the output's tensors as the model made them."""
        if isinstance(self.wrapped, DistributedDataParallel):
            self.wrapped.require_backward_grad_sync = self.at_boundary  # as DDP's no_sync
        with self._autocast():
            return self.wrapped(**batch)

    def backward(self, loss: torch.Tensor) -> None:
        """Adds to the gradients; under DDP the last micro-batch of a step reduces them."""
        (loss / (self.run.grad_accum_steps or 1)).backward()

    def step(self) -> None:
        """Called after every micro-batch; acts after the last of a step."""
        boundary = self.at_boundary
        self.micro_batches += 1
        if not boundary:
            return
        if self.run.training.max_grad_norm > 0:
            torch.nn.utils.clip_grad_norm_(self.trainable, self.run.training.max_grad_norm)
        self.optimizer.step()
        self.module.zero_grad(set_to_none=True)

    def _autocast(self) -> AbstractContextManager[Any]:
        if not self.run.precision.endswith("autocast"):
            return nullcontext()
        return torch.autocast(self.device_type, dtype=torch.bfloat16)


def _distributed(model: torch.nn.Module) -> DistributedDataParallel:
    """DDP with accelerate's defaults. In a fake group no other rank compares shapes, and a reduction has no result:
    the bucket stands as it is."""
    import torch.nn.parallel.distributed as ddp

    ddp._verify_param_shape_across_processes = lambda *_, **__: None  # type: ignore[attr-defined]
    wrapped = DistributedDataParallel(model)
    wrapped.register_comm_hook(None, lambda _, bucket: _done(bucket.buffer()))
    return wrapped


def _done(result: torch.Tensor) -> torch.futures.Future[torch.Tensor]:
    done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    done.set_result(result)
    return done
