"""Muon under ZeRO-3 (deepspeed 0.19.8, runtime/zero/stage3.py, ``_apply_muon_to_accumulated_grads``): before the norm
gradients and momentum are gathered, about a bucket of them at a time, and each rank makes the updates of its turn.

What NCCL flattens within a gather of a list of tensors (``ProcessGroupNCCL::allgather``) is not counted;
the process group of the simulator does not make it either.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from math import prod

from vramplan.memory import labels
from vramplan.memory.between import Files
from vramplan.memory.job import Job
from vramplan.memory.moments import Bytes, Parts, Stretch, merged
from vramplan.memory.muon import update_bytes
from vramplan.memory.reduction import sub_groups
from vramplan.memory.size import ZERO
from vramplan.memory.zero3 import Zero3
from vramplan.spec.layout import shard

MOST_CACHED = 256 * 2**20
"""``_muon_allgather_max_cached_bytes``."""

Chunk = tuple[tuple[str, int], ...]
"""Matrices that are gathered together, and their elements."""


class Muon3(Zero3):
    """Momentum of a sub-group of matrices is made with the engine, in the format that gradients travel in."""

    def __init__(self, job: Job, rank: int, steps_skipped: bool = False) -> None:
        super().__init__(job, rank, steps_skipped)
        self.together = sub_groups(job.groups, job.degree, job.zero.sub_group_size)
        self.of_matrices = [group[0][0] in job.matrices for group in self.together]
        pairs = zip(self.sub_groups, self.of_matrices, strict=True)
        self.momentum = sum(share for share, is_muon in pairs if is_muon) * self.travels
        self.cached: OrderedDict[int, int] = OrderedDict()
        """Bytes of the buffers that are kept for further gathers, by the elements of a rank's parts."""

    def files(self) -> Files:
        """As without Muon, with the states that there are."""
        states = self.states().get(labels.MOMENTS, ZERO)
        assert not isinstance(states, int)
        own = self.trained_share * self.master_bytes + states[0]
        return Files(own=own, largest_own=self.sub_group * self.master_bytes)

    def _init_on_device(self, stretch: Stretch, weights: Parts | Bytes) -> None:
        super()._init_on_device(stretch, merged(weights, {labels.MOMENTS: self.momentum}))

    def _states(self, count: int) -> Parts:
        pairs = zip(self.sub_groups[:count], self.of_matrices[:count], strict=True)
        return self.moments(self.optimizer, *(share for share, is_muon in pairs if not is_muon))

    def _chunks(self) -> Iterator[Chunk]:
        """Matrices of a sub-group as many as a bucket holds, at least one."""
        for group, is_muon in zip(self.together, self.of_matrices, strict=True):
            chunk: list[tuple[str, int]] = []
            for name, numel in group if is_muon else ():
                if chunk and sum(each for _, each in chunk) + numel > self.job.zero.reduce_bucket_size:
                    yield tuple(chunk)
                    chunk = []
                chunk.append((name, numel))
            if chunk:
                yield tuple(chunk)

    def _finish(self, stretch: Stretch, base: Bytes) -> Bytes:
        """Every chunk's gradients and momentum whole, and the updates; gathered gradients stay until the next chunk's
        are replaced by its own updates (the loop's variables)."""
        base, before = base.without(labels.MUON_GATHERS), 0
        for chunk in self._chunks():
            gathered = self._whole(chunk)
            for transient in self._gathering(chunk):
                self._see(stretch, base, before + transient)
            clones = sum(shard(numel, self.job.degree) for _, numel in chunk) * self.travels
            for transient in self._gathering(chunk):
                self._see(stretch, base, before + gathered + clones + transient)
            momentum = gathered if self.job.degree > 1 else 0
            for highest in self._rounds(chunk):
                self._see(stretch, base, before + gathered + momentum + clones, highest)
            before = gathered
        kept = {labels.MUON_GATHERS: sum(self.cached.values())}
        self.resident = merged(self.resident.without(labels.MUON_GATHERS), kept)
        return merged(base, kept)

    def _see(self, stretch: Stretch, base: Bytes, gathers: int, scratch: int = 0) -> None:
        buffers = {labels.MUON_GATHERS: gathers + sum(self.cached.values())}
        stretch.see("Muon's update", base, buffers, {labels.STEP_SCRATCH: scratch})

    def _whole(self, chunk: Chunk) -> int:
        """Bytes of a chunk whole, each matrix padded to a multiple of the ranks; one rank has them as they are."""
        degree = self.job.degree
        return sum(degree * shard(numel, degree) for _, numel in chunk) * self.travels if degree > 1 else 0

    def _gathering(self, chunk: Chunk) -> Iterator[int]:
        """Bytes beside the buffers that are kept, at the highest instants of a gather: new buffers before others are
        let go of for them, or that are too large to be kept (``_partitioned_buffers_all_gather``)."""
        degree = self.job.degree
        if degree == 1:
            return
        local = sum(shard(numel, degree) for _, numel in chunk)
        buffers = self.cached.pop(local, 0)
        fresh = 0 if buffers else (degree + 1) * local * self.travels
        if fresh:
            yield fresh
        if fresh <= MOST_CACHED:
            while fresh and self.cached and sum(self.cached.values()) + fresh > MOST_CACHED:
                self.cached.popitem(last=False)
            self.cached[local] = buffers or fresh
            fresh = 0
        yield fresh + self._whole(chunk)

    def _rounds(self, chunk: Chunk) -> Iterator[int]:
        """Bytes of an update and of what its round and the one before exchange (``_muon_update_sub_group``): matrices
        of one size are gathered where they lie, others by way of padded copies."""
        degree, width, job = self.job.degree, self.travels, self.job
        dtype = job.grad_dtype if job.communicates is None else job.communicates
        held = last = 0
        for start in range(0, len(chunk), degree):
            names = [name for name, _ in chunk[start : start + degree]]
            shapes = [job.matrices[name] for name in names]
            largest = max(prod(shape) for shape in shapes) * width
            yield last + held + update_bytes(shapes[0], dtype, job.device)
            last = prod(shapes[0]) * width
            if len(shapes) == degree and len(set(shapes)) == 1:
                held = 0
                continue
            before, after = held // (2 + 2 * degree), largest
            yield last + 2 * after + degree * (2 * before + after)
            yield last + 2 * after + degree * (before + 2 * after)
            held = (2 + 2 * degree) * after
            yield last + held
