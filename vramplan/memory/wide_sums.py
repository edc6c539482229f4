"""ZeRO-2 with gradients summed in fp32 beside weights of a lower format (``grad_accum_dtype: fp32``).

Source: deepspeed 0.19.8, runtime/zero/stage_1_and_2.py, ``_use_compact_grad_partition_buffer``: the rank's gradients
are added to one fp32 buffer of exactly its partition as each bucket is reduced, and the step takes that buffer as it
is.
"""

from __future__ import annotations

from collections.abc import Hashable

from vramplan.facts.dtype import Dtype
from vramplan.memory import labels
from vramplan.memory.engine import Micro
from vramplan.memory.job import Job
from vramplan.memory.moments import Instant, Stretch, merged
from vramplan.memory.partition import Flush, flushes
from vramplan.memory.size import ZERO
from vramplan.memory.term import Phase
from vramplan.memory.zero12 import Zero12

_WIDE = Dtype.FP32.nbytes


class WideSums(Zero12):
    """Stage 2; the sums are there from the first reduction that holds gradients of the rank's."""

    def __init__(self, job: Job, rank: int) -> None:
        super().__init__(job, rank)
        self.sends = False  # sums are on the device, wherever states lie
        self.partition_bytes = self.share * _WIDE
        self._of_sums: dict[bool, dict[Hashable, list[Instant]]] = {False: {}, True: {}}

    def backward(self, micro: Micro) -> None:
        self._reducing = self._of_sums[self._are_there]
        super().backward(micro)

    @property
    def _are_there(self) -> bool:
        """Whether earlier micro-batches left sums."""
        return self.resident.get(labels.GRAD_PARTITION, ZERO)[0] > 0

    def _partition(self) -> dict[str, int]:
        return {} if self._are_there else {labels.GRAD_PARTITION: self.partition_bytes}

    def _flushes(self, order: tuple[str, ...]) -> tuple[Flush, ...]:
        bucket = self.job.zero.reduce_bucket_size
        return flushes(order, self.flat, bucket, self.lowered, self.reduces, apart=self.rank)

    def _copy_bytes(self, flush: Flush) -> int:
        """Each slice of the rank's is widened to be added (``_add_to_grad_partition_buffer``), unless it travels so."""
        travels_wide = self.job.layout.sp > 1
        widened = 0 if travels_wide else max((self.owned.get(name, 0) for name in flush.held), default=0)
        return super()._copy_bytes(flush) + widened * _WIDE

    def _made_first(self, flush: Flush) -> dict[str, int]:
        return self._partition() if self.rank in flush.ranks else {}

    def _stays_whole(self, flush: Flush) -> bool:
        """It lies in no bucket, and nothing takes its place (``copy_grads_in_partition`` returns at once)."""
        return self.rank in flush.ranks

    def _end_of_reduction(self, stretch: Stretch, micro: Micro) -> None:
        self.outputs = self.after_backward()
        sums = {labels.GRAD_PARTITION: self.partition_bytes}
        self.resident = merged(self.resident.without(labels.GRAD_PARTITION), sums)
        stretch.close(self.resident, self.outputs)

    def step(self, micro: Micro) -> None:
        if not self.offloads or not micro.boundary:
            super().step(micro)
            return
        stretch = self.open(micro.phase("optimizer_step"), Phase.OPTIMIZER_STEP, micro.step)
        stretch.see("gradient norm", self.resident, self.outputs, {labels.NORM: 8 * self.largest_owned})
        self._step_on_host(stretch, micro.step == 1)
        self.resident = self.resident.without(labels.GRAD_PARTITION)
        stretch.close(self.resident, self.outputs)

    def _update(self, stretch: Stretch, index: int, first: bool) -> None:
        """One group's step: its sums are its gradient, and go with it."""
        share, left = self.flat.partitions[index], self.resident.get(labels.GRAD_PARTITION, ZERO)[0]
        if first:
            states = self.moments(self.optimizer, *self.flat.partitions[: index + 1])
            self.resident = merged(self.resident.without(labels.MOMENTS, labels.HOST_PAGED), states)
        scratch = {labels.STEP_SCRATCH: share * self.optimizer.scratch}
        stretch.see("optimizer update", self.resident, self.outputs, scratch)
        sums = {labels.GRAD_PARTITION: left - share * _WIDE}
        self.resident = merged(self.resident.without(labels.GRAD_PARTITION), sums)
