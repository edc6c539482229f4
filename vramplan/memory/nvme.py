"""ZeRO-3 with states, or states and weights, in files (deepspeed 0.19.8, runtime/swap_tensor/; sizes as its config has
them where nothing is said: ``aio``, ``offload_optimizer.buffer_count``, ``offload_param.buffer_count`` and so on)."""

from __future__ import annotations

from vramplan.memory import labels
from vramplan.memory.engine import Micro
from vramplan.memory.job import Job
from vramplan.memory.labels import term
from vramplan.memory.moments import Bytes, Parts, Stretch, merged
from vramplan.memory.term import Place, Term
from vramplan.memory.zero3 import Zero3
from vramplan.spec.layout import shard

MIN_SWAPPED = 1 << 20
"""Bytes of the smallest tensor that goes to a file (swap_tensor/utils.py, ``MIN_AIO_BYTES``; ``aio.block_size``)."""
ALIGNED = 1024
"""Files and buffers are of multiples of as many bytes (``AIO_ALIGNED_BYTES`` x ``aio.intra_op_parallelism``)."""
STATE_BUFFERS = 4
"""``offload_optimizer.buffer_count``, each as large as the largest sub-group in fp32."""
PARAM_BUFFERS = 5
"""``offload_param.buffer_count``."""
PARAM_BUFFER_NUMEL = 100_000_000
"""``offload_param.buffer_size``: no part of a tensor may have more elements."""
MAX_IN_CPU = 1_000_000_000
"""``offload_param.max_in_cpu``: trained elements of a rank that stay in the host's memory all the same."""


def aligned(num_bytes: int) -> int:
    """As many bytes as a file or a buffer has for so many."""
    return -(-num_bytes // ALIGNED) * ALIGNED


def on_disk(job: Job) -> bool:
    """Whether anything goes to files."""
    return "nvme" in (job.zero.offload_optimizer, job.zero.offload_param)


def why_uncovered(job: Job) -> dict[str, bool]:
    """What of offload to files is not counted."""
    weights = job.zero.offload_param == "nvme"
    shares = [shard(param.numel, job.degree) for param in job.parameters] if weights else []
    trained = sum(shard(param.numel, job.degree) for param in job.parameters if param.trained) if weights else 0
    return {
        # They stay in files, and come through five buffers. In the second step DeepSpeed's prefetch takes all of them
        # (partitioned_param_coordinator.py, __prefetch_nvme_param_partitions), and the next fetch is an assertion of
        # its own ("Not enough buffers"): so it ended with adapters, and with frozen layers under checkpointing.
        "frozen weights on NVMe": weights and any(not param.trained for param in job.parameters),
        f"more than {MAX_IN_CPU:,} elements of weights a rank on NVMe": trained > MAX_IN_CPU,
        f"a part of more than {PARAM_BUFFER_NUMEL:,} elements on NVMe": max(shares, default=0) > PARAM_BUFFER_NUMEL,
        "NVMe where DeepSpeed counts micro-batches": on_disk(job) and job.managed,
        "states in memory beside weights on NVMe": weights and job.zero.offload_optimizer == "none",
    }


class Zero3Nvme(Zero3):
    """States of sub-groups that are large enough lie in files, and come through buffers for their step."""

    def __init__(self, job: Job, rank: int, steps_skipped: bool = False) -> None:
        super().__init__(job, rank, steps_skipped)
        self.swaps = job.zero.offload_optimizer == "nvme"
        swapped = [numel for numel in self.sub_groups if self.swaps and 4 * numel >= MIN_SWAPPED]
        self.in_memory = self.trained_share - sum(swapped)
        """Elements of sub-groups that are too small."""
        self.swapped = swapped
        self.shares = self._shares_swapped()

    def _shares_swapped(self) -> list[int]:
        """The rank's parts of the parameters of sub-groups that are swapped, in order."""
        found: list[int] = []
        group: list[int] = []
        for param in self.job.parameters:
            if param.trained:
                group.append(shard(param.numel, self.job.degree))
                if sum(group) >= self.job.zero.sub_group_size:
                    found += group if 4 * sum(group) >= MIN_SWAPPED else []
                    group = []
        return [*found, *(group if 4 * sum(group) >= MIN_SWAPPED else [])] if self.swaps else []

    def _offloaded(self) -> Bytes:
        low, kept = self.trained_share * self.grad_width, self.in_memory * self.master_bytes
        parts = dict(super()._offloaded())
        pinned: list[int] = [low, kept]
        if self.job.offload_param:
            pinned += [self.trained_share * self.trained_width, *self._parts(trained=False)]
        if self.job.zero.offload_param == "nvme":
            small = [size for size in self._parts(trained=True) if size < MIN_SWAPPED]
            parts |= merged({labels.HOST_CACHED: self.pinned(*small), labels.HOST_POOL: self._pool()})
        states: Parts = {labels.HOST_MASTER_PAGED: kept, labels.HOST_GRAD: kept, labels.HOST_SWAP: self._buffers()}
        return Bytes({**parts, **merged(states), **merged(self.pinned_rounding(*pinned))})

    def _pool(self) -> int:
        """``AsyncPartitionedParameterSwapper``: one page-locked block."""
        return PARAM_BUFFERS * aligned(PARAM_BUFFER_NUMEL * self.trained_width)

    def _buffers(self) -> int:
        """``SwapBufferManager``."""
        return STATE_BUFFERS * aligned(self.sub_group * self.master_bytes) if self.swaps else 0

    def _spare(self) -> int:
        """``initialize_optimizer_states``: a buffer of the largest sub-group; those in memory are pinned one by one."""
        left = [numel for numel in self.sub_groups if numel not in self.swapped]
        own = max(left, default=0) if self.job.device != "cpu" else 0
        return (self.sub_group + own) * self.master_bytes

    def _see_finalised(self, stretch: Stretch) -> None:
        """Gradients in fp32 are held on the device, all of the rank's, until the last has its norm."""
        held = self._held(0)
        best: tuple[int, Parts] = (0, {})
        for share in self.shares:
            away = self._sent_away(share, True)
            total = held + sum(int(size) if isinstance(size, int) else size[0] for size in away.values())
            if total >= best[0]:
                best = total, merged({labels.SWAPPED_GRADS: held}, away)
            held += self._held(share)
        stretch.see("gradients on their way to files", self.resident, self.outputs, best[1])
        stretch.see("gradients held for files", self.resident, self.outputs, {labels.SWAPPED_GRADS: held})
        if self.in_memory:
            super()._see_finalised(stretch)

    def _held(self, share: int) -> int:
        """Bytes that stay on the device of a part whose norm is taken: on the CPU fp32 gradients are where they lie."""
        if self.job.device == "cpu" and self.grad_width == self.master_bytes:
            return 0
        return share * self.master_bytes

    def _unswapped(self) -> int:
        """What stays on the device until its sub-group has stepped: parts that are too small for a file, and parts with
        a rest that fills no block, of which it is a view."""
        sizes = (share * self.master_bytes for share in self.shares)
        return sum(self._held(size // self.master_bytes) for size in sizes if size < MIN_SWAPPED or size % ALIGNED)

    def _see_update(self, stretch: Stretch, kept: Bytes, micro: Micro) -> None:
        """A sub-group's states come through the buffers; the first time CPUAdam makes the moments beside them."""
        waiting = {labels.SWAPPED_GRADS: self._unswapped()}
        if micro.step == 1 and not self.steps_skipped:
            states = {labels.HOST_MOMENTS: self.optimizer.state_bytes(self.in_memory)}
            made = {labels.HOST_MOMENTS: self.optimizer.state_bytes(max(self.swapped, default=0))}
            self.resident = merged(self.resident, states)
            stretch.see("moments made", self.resident, kept, waiting, made)
        stretch.see("optimizer update", self.resident, kept, waiting)


def disk_terms(job: Job) -> tuple[Term, ...]:
    """One rank's files."""
    if not on_disk(job):
        return ()
    walked = Zero3Nvme(job, 0)
    state = sum(aligned(numel * walked.master_bytes) for numel in walked.swapped)
    sizes = [share * walked.master_bytes for share in walked.shares]
    grads = sum(size // ALIGNED * ALIGNED for size in sizes if size >= MIN_SWAPPED)
    weights = 0
    if job.zero.offload_param == "nvme":
        weights = sum(aligned(size) for size in walked._parts(trained=True) if size >= MIN_SWAPPED)
    found = {labels.DISK_MASTER: state, labels.DISK_MOMENTS: 2 * state, labels.DISK_GRADS: grads}
    every = {**found, labels.DISK_WEIGHTS: weights}
    return tuple(term(name, size, Place.NVME) for name, size in every.items() if size)
