"""Muon under ZeRO-1 and ZeRO-2 with the optimizer offloaded (deepspeed 0.19.8, runtime/zero/stage_1_and_2.py,
``_apply_muon_updates_cpu_offload``): states lie in the host's memory, and each step brings whole gradients and momenta
of a few matrices at a time to the device to orthogonalise them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from math import prod

from vramplan.facts.dtype import Dtype
from vramplan.memory import labels
from vramplan.memory.between import Files
from vramplan.memory.job import Job
from vramplan.memory.moments import Stretch, merged
from vramplan.memory.muon import update_bytes
from vramplan.memory.size import ZERO
from vramplan.memory.zero12 import Zero12

GATHER_BYTES = 64 * 2**20
"""What one gather may take (``_muon_allgather_max_buffer_bytes``); matrices come together up to that, with momenta."""
KEPT_BYTES = 256 * 2**20
"""Buffers that are kept for later gathers, the least recent let go of first (``_muon_allgather_max_cached_bytes``)."""
WIDTH = Dtype.FP32.nbytes
"""Of gradients and momenta, which lie in the host's memory in the master's format."""


class Muon12Offloaded(Zero12):
    """Groups of matrices have momentum alone, what CPUAdam steps two moments."""

    def __init__(self, job: Job, rank: int) -> None:
        super().__init__(job, rank)
        self.of_matrices = [group[0][0] in job.matrices for group in job.groups]
        self.buffers: dict[tuple[int, int, int], int] = {}
        """Bytes of the buffers that are kept, the least recent first."""

    def files(self) -> Files:
        """As without Muon, with the states that there are."""
        own = self.share * self.master_bytes + sum(map(self._state_bytes, range(len(self.of_matrices))))
        found = super().files()
        return Files(found.shared, own, found.largest_shared, found.largest_own)

    def _state_bytes(self, index: int) -> int:
        share = self.flat.partitions[index]
        return share * WIDTH if self.of_matrices[index] else self.optimizer.state_bytes(share)

    def _step_on_host(self, stretch: Stretch, first: bool) -> None:
        """Matrices are orthogonalised group by group before the norm is taken; then every group steps."""
        for index in range(len(self.of_matrices)):
            if self.of_matrices[index]:
                self._made(index, first)
                for names in self._batches(index):
                    self._see_batch(stretch, index, names, first)
        for index, is_muon in enumerate(self.of_matrices):
            if not is_muon:
                self._made(index, first)
            stretch.see("optimizer update", self.resident, self.outputs)

    def _made(self, index: int, first: bool) -> None:
        """A group's states come to be in the first step."""
        if first:
            self.resident = merged(self.resident, {labels.HOST_MOMENTS: self._state_bytes(index)})

    def _batches(self, index: int) -> Iterator[list[str]]:
        """Matrices that are gathered together (``_muon_param_batches``), in the order of the flat buffer."""
        names = sorted((name for name, _ in self.job.groups[index]), key=lambda name: self.flat.offsets[name])
        batch: list[str] = []
        for name in names:
            if batch and sum(self.sizes[each] for each in (*batch, name)) > GATHER_BYTES // (2 * WIDTH):
                yield batch
                batch = []
            batch.append(name)
        yield batch

    def _see_batch(self, stretch: Stretch, index: int, names: list[str], first: bool) -> None:
        """Whole gradients and momenta beside the buffers that they came through, and each matrix's update; the last
        one stays until the next is made, and the norm of the rank's slice of it is taken in fp64."""
        self._gathered(index, names, 1 if first else 2)
        whole = {labels.GRADIENTS: 2 * WIDTH * sum(self.sizes[name] for name in names)}
        last = 0
        for name in names:
            shape = self.job.matrices[name]
            made = prod(shape) * WIDTH
            scratch = last + update_bytes(shape, Dtype.FP32, self.job.device)
            if name in self.owned:
                scratch = max(scratch, made + 8 * self.owned[name])
            stretch.see("Muon's update", self.resident, self.outputs, whole, {labels.STEP_SCRATCH: scratch})
            last = made

    def _gathered(self, index: int, names: list[str], count: int) -> None:
        """The buffers of a gather of ``count`` flat tensors stay for the next of its kind
        (``_muon_all_gather_partitions``); one rank needs none."""
        degree = self.flat.degree
        if degree == 1:
            return
        held = Counter[int]()
        for name in names:
            held.update({rank: self.flat.owned_by(name, rank) for rank in self.flat.ranks_of(name)})
        longest = max(held.values())
        chunk = min(longest, max(1, GATHER_BYTES // ((degree + 1) * count * WIDTH)))
        key, num_bytes = (index, chunk, count), chunk * count * (degree + 1) * WIDTH
        self.buffers.pop(key, None)
        while self.buffers and sum(self.buffers.values()) + num_bytes > KEPT_BYTES:
            del self.buffers[next(iter(self.buffers))]
        self.buffers[key] = num_bytes
        before = self.resident.get(labels.MUON_GATHERS, ZERO)
        if before != (sum(self.buffers.values()), *before[1:]):
            rest = self.resident.without(labels.MUON_GATHERS)
            self.resident = merged(rest, {labels.MUON_GATHERS: sum(self.buffers.values())})
