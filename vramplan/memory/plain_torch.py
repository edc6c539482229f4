"""Plain PyTorch on one device or under DDP, as transformers' Trainer runs it: weights, gradients and states are torch's
own tensors, one for each parameter."""

from __future__ import annotations

from itertools import pairwise

from vramplan.memory import labels
from vramplan.memory.activations import backward_candidates
from vramplan.memory.engine import Engine, Micro
from vramplan.memory.job import Job
from vramplan.memory.moments import at_point, merged
from vramplan.memory.term import Phase
from vramplan.memory.torch_optimizers import Steps, torch_optimizer

BROADCAST_BYTES = 250 * 2**20
"""Bytes of tensors that DDP flattens for one broadcast when it starts, of which two are under way
(torch/nn/parallel/distributed.py, ``broadcast_bucket_size``; csrc/distributed/c10d/reducer.cpp,
``broadcast_coalesced``, ``max_in_flight``)."""


class PlainTorch(Engine):
    """Weights in the run's format, adapters in PEFT's fp32; gradients are set to None after each step."""

    def __init__(self, job: Job, rank: int) -> None:
        super().__init__(job, rank)
        self.trained_width = (job.adapter_dtype or job.dtype).nbytes
        self.trained_bytes = self.trained_numel * self.trained_width
        trained = tuple((param.numel, param.factored_numel) for param in job.parameters if param.trained)
        self.steps = Steps(torch_optimizer(job.optimizer, job.device, job.momentum), (trained,), self.trained_width)

    def init(self) -> None:
        """The optimizer's states come with its first step; DDP makes its buckets at once."""
        stretch = self.open("engine_init", Phase.ENGINE_INIT)
        if self.job.layout.world_size > 1:
            stretch.see("weights broadcast", self.resident, {labels.INIT: self._largest_broadcasts()})
            self.resident = merged(self.resident, {labels.DDP_BUCKETS: self.trained_bytes})
        stretch.close(self.resident)

    def _largest_broadcasts(self) -> int:
        sizes, filled = [0, 0], 0
        for param in self.job.parameters:
            filled += param.numel * self.trained_width if param.trained else self.job.bytes_of(param)
            if filled >= BROADCAST_BYTES:
                sizes, filled = [*sizes, filled], 0
        sizes.append(filled)
        return max(one + other for one, other in pairwise(sizes))

    def backward(self, micro: Micro) -> None:
        stretch = self.open(micro.phase("backward"), Phase.BACKWARD, micro.step)
        width = self.trained_width if micro.first else 0
        for group in backward_candidates(self.model_run, width):
            for _, point in group:
                stretch.see(point.where, self.resident, {labels.GRADIENTS: width * point.grad_numel}, at_point(point))
        self.outputs = self.after_backward()
        if micro.first:
            self.resident = merged(self.resident, {labels.GRADIENTS: self.trained_bytes})
        stretch.close(self.resident, self.outputs)

    def step(self, micro: Micro) -> None:
        stretch = self.open(micro.phase("optimizer_step"), Phase.OPTIMIZER_STEP, micro.step)
        if micro.boundary:
            before = self.resident.without(labels.MOMENTS, labels.HOST_PAGED)
            states, scratch = self.steps.highest(micro.step == 1)
            paged = {labels.HOST_PAGED: self.steps.paged_bytes}
            alive = {labels.MOMENTS: states, labels.STEP_SCRATCH: scratch, **paged}
            stretch.see("optimizer update", before, self.outputs, alive)
            after = before.without(labels.GRADIENTS)
            self.resident = merged(after, self.moments(self.steps))
        stretch.close(self.resident, self.outputs)
