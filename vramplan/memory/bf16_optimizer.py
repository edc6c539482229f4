"""ZeRO-1 of bf16 weights with gradients summed in fp32 (``grad_accum_dtype: fp32``): DeepSpeed's BF16_Optimizer.

Source: deepspeed 0.19.8, runtime/bf16_optimizer.py: flat weights, the rank's part of the fp32 master weights and their
states, and fp32 gradients of the whole model from the start on, beside those that autograd leaves in bf16.
"""

from __future__ import annotations

from vramplan.memory import labels
from vramplan.memory.between import Files
from vramplan.memory.engine import Micro
from vramplan.memory.job import Job
from vramplan.memory.moments import Stretch, merged
from vramplan.memory.partition import flat_of
from vramplan.memory.term import Phase
from vramplan.memory.zero0 import REDUCE_NUMEL, Zero0


class Bf16Optimizer(Zero0):
    """Backward is ZeRO-0's; what is reduced are the fp32 gradients, flat."""

    def __init__(self, job: Job, rank: int) -> None:
        super().__init__(job, rank)
        self.parts = flat_of(job)
        self.optimizer = self.optimizer_on(job.device)
        self.largest = max((numel for _, numel in self.trained), default=0)

    def init(self) -> None:
        """Group after group: weights flattened beside themselves, the rank's part cloned and widened, gradients."""
        stretch, width = self.open("engine_init", Phase.ENGINE_INIT), self.width
        frozen, left, share = {labels.FROZEN: self.frozen_bytes}, self.trained_numel, 0
        for group, partition in zip(self.job.groups, self.parts.partitions, strict=True):
            before = merged(frozen, self._of_groups(share))
            flat = {labels.WEIGHTS: partition * self.parts.degree * width}
            stretch.see("weights flattened", before, flat, {labels.INIT: left * width})
            left -= sum(numel for _, numel in group)
            master = {labels.MASTER: partition * self.master_bytes}
            stretch.see("master weights cast", before, flat, master, {labels.INIT: (left + partition) * width})
            share += partition
            stretch.see("gradients made", frozen, self._of_groups(share), {labels.INIT: left * width})
        self.resident = merged(frozen, self._of_groups(share))
        stretch.close(self.resident)

    def _of_groups(self, share: int) -> dict[str, int]:
        """What is kept of groups of which a rank has ``share`` elements."""
        whole = share * self.parts.degree
        return {
            labels.WEIGHTS: whole * self.width,
            labels.MASTER: share * self.master_bytes,
            labels.WIDE_GRADIENTS: whole * self.job.grad_dtype.nbytes,
        }

    def files(self) -> Files:
        """Weights as views of the flat buffer; each rank's master and states."""
        own = self.parts.partition_numel * self.master_bytes + self.optimizer.state_bytes(*self.parts.partitions)
        largest = max(self.parts.partitions)
        weights = self.parts.padded_numel * self.width
        return Files(weights, own, largest * self.parts.degree * self.width, largest * self.master_bytes)

    def after_gradients(self, stretch: Stretch) -> None:
        """Each gradient is widened to be added (``update_hp_grads``)."""
        widened = {labels.STEP_SCRATCH: self.largest * self.job.grad_dtype.nbytes}
        stretch.see("gradients widened", self.resident, self.outputs, widened)

    def _reduce(self, stretch: Stretch) -> None:
        """The flat gradients of groups, as many as are more than ``REDUCE_NUMEL`` elements at a time: several are
        flattened together, and what travels is cast (``allreduce_bucket``)."""
        wide, travels = self.job.grad_dtype.nbytes, (self.job.communicates or self.job.grad_dtype).nbytes
        cast = travels if travels != wide else 0
        sizes = [0]
        count = numel = 0
        for partition in self.parts.partitions:
            count, numel = count + 1, numel + partition * self.parts.degree
            sizes.append(numel * (cast + (wide if count > 1 else 0)))
            if numel > REDUCE_NUMEL:
                count = numel = 0
        stretch.see("gradient reduction", self.resident, self.outputs, {labels.REDUCTION: max(sizes)})

    def step(self, micro: Micro) -> None:
        stretch = self.open(micro.phase("optimizer_step"), Phase.OPTIMIZER_STEP, micro.step)
        if micro.boundary:
            if not self.job.managed:
                self._reduce(stretch)
            for index, share in enumerate(self.parts.partitions):
                if micro.step == 1:
                    states = self.moments(self.optimizer, *self.parts.partitions[: index + 1])
                    self.resident = merged(self.resident.without(labels.MOMENTS, labels.HOST_PAGED), states)
                scratch = {labels.STEP_SCRATCH: share * self.optimizer.scratch}
                stretch.see("optimizer update", self.resident, self.outputs, scratch)
            self.resident = self.resident.without(labels.GRADIENTS)
        stretch.close(self.resident, self.outputs)
