"""ZeRO-1 and ZeRO-2's flat partitioning: which elements a rank owns, and when gradient buckets are reduced.

Source: deepspeed 0.19.8, runtime/zero/stage_1_and_2.py. All trainable parameters of a group are laid end to end,
padded to a multiple of ``2 * degree`` (``nccl_start_alignment_factor``), and cut into equal partitions. There is one
group, but for ``retain.layer_lr_decay``, which makes one for each rate.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Literal

from vramplan.facts.architecture import Architecture
from vramplan.facts.dtype import Dtype
from vramplan.memory import labels
from vramplan.memory.job import Job
from vramplan.memory.moments import Stretch
from vramplan.memory.muon import update_bytes
from vramplan.memory.parameters import Groups, Matrices, matrix_shapes, parameter_groups
from vramplan.spec.layout import shard
from vramplan.spec.trainable import Method

Grouping = tuple[Architecture, Method, frozenset[str], float, Matrices]
"""What decides the optimizer's groups (``Job.grouping``)."""
START_ALIGNMENT = 2
"""``nccl_start_alignment_factor``: all-gather buffers start at multiples of 4 bytes."""


@dataclass(frozen=True, slots=True, eq=False)
class Flat:
    """The flat buffers of all parameter groups: element ranges within each, and equal partitions of each."""

    offsets: dict[str, tuple[int, int]]
    """Elements of each parameter within its group's buffer."""
    shares: dict[str, int]
    """Elements of one rank's part of that buffer."""
    partitions: tuple[int, ...]
    """Elements of one rank's part of each group."""
    degree: int

    @property
    def partition_numel(self) -> int:
        """Elements of one rank's parts of all groups."""
        return sum(self.partitions)

    @property
    def padded_numel(self) -> int:
        return self.partition_numel * self.degree

    def ranks_of(self, name: str) -> range:
        """The ranks whose partitions hold elements of a parameter."""
        (start, end), share = self.offsets[name], self.shares[name]
        return range(start // share, -(-end // share))

    @lru_cache(maxsize=1024)  # noqa: B019 - a buffer is compared by identity, and kept by ``_flat_of`` anyway
    def owned(self, rank: int) -> Mapping[str, int]:
        """The parameters that lie in the rank's partitions at least in part, with the elements that do."""
        cut = {name: self.owned_by(name, rank) for name in self.offsets}
        return MappingProxyType({name: numel for name, numel in cut.items() if numel > 0})

    def owned_by(self, name: str, rank: int) -> int:
        """Elements of the parameter that lie in the rank's partition."""
        (start, end), share = self.offsets[name], self.shares[name]
        return max(0, min(end, (rank + 1) * share) - max(start, rank * share))


def flat_of(job: Job) -> Flat:
    """The flat buffers of a job's trained parameters."""
    alignment = 16 // job.dtype.nbytes if job.zero.parameter_alignment else 1
    return _flat_of(job.grouping, job.degree, alignment, job.zero.round_robin_gradients)


@lru_cache(maxsize=256)
def _flat_of(grouping: Grouping, degree: int, alignment: int, round_robin: bool) -> Flat:
    return flat_groups(parameter_groups(*grouping), degree, alignment, round_robin)


def flat_groups(groups: Groups, degree: int, alignment: int = 1, round_robin: bool = False) -> Flat:
    """The flat buffer of each group.

    ``alignment``: elements at whose multiples parameters begin (``round_robin_bit16_padding``). ``round_robin``: every
    ``degree``-th parameter of a group comes first, then the one after each of those (``_round_robin_reorder``).
    """
    offsets: dict[str, tuple[int, int]] = {}
    shares: dict[str, int] = {}
    partitions: list[int] = []
    for group in groups:
        laid = [each for first in range(degree) for each in group[first::degree]] if round_robin else group
        position = 0
        for name, numel in laid:
            position += -position % alignment
            offsets[name] = (position, position + numel)
            position += numel
        partitions.append(shard(position, START_ALIGNMENT * degree) * START_ALIGNMENT)
        shares |= dict.fromkeys((name for name, _ in group), partitions[-1])
    return Flat(offsets, shares, tuple(partitions), degree)


def see_flattened(stretch: Stretch, job: Job, flat: Flat, frozen_bytes: int) -> None:
    """Instants of ``__init__``: each group is flattened beside its weights, then the rank's part is cloned and cast."""
    frozen, width, share = {labels.FROZEN: frozen_bytes}, job.dtype.nbytes, 0
    master_width = 0 if job.offload_optimizer else job.master_dtype.nbytes
    left = sum(numel for group in job.groups for _, numel in group)
    stretch.see("adapters cast", frozen, {labels.INIT: _cast_bytes(job)})
    for group, partition in zip(job.groups, flat.partitions, strict=True):
        masters = {labels.MASTER: share * master_width}
        share += partition
        buffers = {labels.WEIGHTS: share * flat.degree * width}
        stretch.see("weights flattened", frozen, buffers, masters, {labels.INIT: left * width})
        left -= sum(numel for _, numel in group)
        masters = {labels.MASTER: share * master_width}
        stretch.see("master weights cast", frozen, buffers, masters, {labels.INIT: (left + partition) * width})


def _cast_bytes(job: Job) -> int:
    """Adapters as PEFT made them and as the engine casts them, one after the other, at the highest instant."""
    numels, width, wide = (
        [param.numel for param in job.parameters if param.adapter],
        job.dtype.nbytes,
        Dtype.FP32.nbytes,
    )
    if width == wide:
        return wide * sum(numels)
    total = highest = wide * sum(numels)
    for numel in numels:
        highest = max(highest, total + numel * width)
        total += numel * (width - wide)
    return highest


@dataclass(frozen=True, slots=True)
class Flush:
    """One reduction of the bucket: it happens when gradient ``before`` arrives (None: after the last)."""

    before: int | None
    numel: int
    copied: int
    """Elements of the largest buffer into which the reduction flattens slices that belong to several ranks."""
    sent: int
    """Elements of the largest of the reductions that it is made in."""
    lowered: bool
    """Whether it is made in autocast's format."""
    ranks: frozenset[int]
    """Those whose partitions it holds gradients of; each then has a buffer for its own."""
    held: tuple[str, ...]
    """The parameters whose gradients it holds, in their order of arrival."""


Reduces = Literal["slices", "ranks", "bucket", "gradients"]
"""What a reduction flattens (``average_tensor``): all slices of a bucket, those of each rank by themselves
(``use_multi_rank_bucket_allreduce: false``), nothing, the bucket being reduced as it is (``reduce_scatter: false``), or
whole gradients where there is no bucket (``contiguous_gradients: false``)."""


def reduces_of(job: Job) -> Reduces:
    """What the reductions of a job flatten."""
    if not job.zero.contiguous_gradients and not job.offload_optimizer:
        return "gradients"
    if not job.zero.reduce_scatter:
        return "bucket"
    return "slices" if job.zero.use_multi_rank_bucket_allreduce else "ranks"


@lru_cache(maxsize=1024)
def flushes(
    order: tuple[str, ...],
    flat: Flat,
    bucket_numel: int,
    lowered: frozenset[str] = frozenset(),
    reduces: Reduces = "slices",
    apart: int | None = None,
) -> tuple[Flush, ...]:
    """When gradients that arrive in ``order`` fill buckets of ``bucket_numel`` elements.

    ``lowered``: those that are reduced in autocast's format, which have a bucket of their own (``ipg_buckets``).
    ``apart``: a rank whose slices are reduced each by itself, since each is added to a place of its own (fp32 sums).

    Source: ``reduce_independent_p_g_buckets_and_remove_grads`` and ``average_tensor``.
    """
    done: list[Flush] = []
    buckets: dict[bool, list[str]] = {True: [], False: []}  # the low precision's name sorts first (``sort_dtypes``)
    elements = {True: 0, False: 0}
    for position, name in enumerate(order):
        start, end = flat.offsets[name]
        low = name in lowered
        if elements[low] + end - start > bucket_numel and buckets[low]:
            done.append(_flush(flat, buckets[low], bucket_numel, position, low, reduces, apart))
            buckets[low], elements[low] = [], 0
        buckets[low].append(name)
        elements[low] += end - start
    done += [_flush(flat, held, bucket_numel, None, low, reduces, apart) for low, held in buckets.items() if held]
    return tuple(done)


def _flush(
    flat: Flat,
    held: list[str],
    bucket_numel: int,
    before: int | None,
    low: bool,
    reduces: Reduces,
    apart: int | None,
) -> Flush:
    slices: list[tuple[int, int]] = []
    for name in held:
        for rank in flat.ranks_of(name):
            numel = flat.owned_by(name, rank)
            if slices and slices[-1][0] == rank != apart:
                numel += slices.pop()[1]
            slices.append((rank, numel))
    total = sum(numel for _, numel in slices)
    copied = sent = 0
    for count, numel in _reductions(slices, len(held), bucket_numel, reduces):
        copied, sent = max(copied, numel if count > 1 else 0), max(sent, numel)
    return Flush(before, total, copied, sent, low, frozenset(rank for rank, _ in slices), tuple(held))


def _reductions(
    slices: list[tuple[int, int]], num_held: int, bucket_numel: int, reduces: Reduces
) -> Iterator[tuple[int, int]]:
    """Tensors and elements of each reduction of a bucket; a lone tensor is not copied to be flattened."""
    if reduces in ("bucket", "gradients"):
        yield num_held if reduces == "gradients" else 1, sum(numel for _, numel in slices)
        return
    if reduces == "slices":
        yield from _sent_together([numel for _, numel in slices], bucket_numel)
        return
    for rank in dict(slices):
        yield from _sent_together([numel for each, numel in slices if each == rank], bucket_numel)


def _sent_together(slices: list[int], bucket_numel: int) -> Iterator[tuple[int, int]]:
    """Slices and elements of each reduction: as many slices as are more than a bucket (``allreduce_and_scatter``)."""
    count = numel = 0
    for each in slices:
        count, numel = count + 1, numel + each
        if numel > bucket_numel:
            yield count, numel
            count = numel = 0
    if count:
        yield count, numel


def copied_bytes(flush: Flush, job: Job, reduces: Reduces) -> int:
    """A flat copy of a reduction's slices, and one in the format that they travel in (``allreduce_bucket``): fp32 under
    sequence parallelism, autocast's where it is made in that."""
    travels = width = job.dtype.nbytes
    if job.layout.sp > 1 and reduces != "bucket":
        travels = Dtype.FP32.nbytes
    elif flush.lowered and job.autocast is not None:
        travels = job.autocast.nbytes
    return flush.copied * width + (flush.sent * travels if travels != width else 0)


def ranks_that_differ(job: Job) -> list[int]:
    """The ranks that can hold most: of two ranks, one whose own tensors are no larger, whose largest slice is no
    larger and whose gradients come no earlier cannot exceed the other."""
    if job.stage not in (1, 2) or job.degree == 1:
        return [0]
    # stage 1 reduces in the order of the parameters, stage 2 in that of backward, about its reverse
    oversized = job.zero.reduce_bucket_size if job.stage == 1 else None
    return _ranks_that_differ(job.grouping, flat_of(job), job.stage == 2, oversized)


@lru_cache(maxsize=256)
def _ranks_that_differ(grouping: Grouping, flat: Flat, backwards: bool, bucket_numel: int | None) -> list[int]:
    degree, trained = flat.degree, [each for group in parameter_groups(*grouping) for each in group]
    touched, slices, early = [0] * degree, [0] * degree, [-len(trained)] * degree
    freed = [0] * degree  # stage 1 lets go of a gradient larger than the bucket only where it is the rank's own
    matrices = matrix_shapes(*grouping[:3]) if grouping[-1] != "together" else {}
    momentum, update = [0] * degree, [0] * degree
    for position, (name, numel) in enumerate(trained):
        for rank in flat.ranks_of(name):
            touched[rank] += numel
            slices[rank] = max(slices[rank], flat.owned_by(name, rank))
            freed[rank] -= numel if bucket_numel is not None and numel > bucket_numel else 0
            early[rank] = max(early[rank], position if backwards else -position)
            if name in matrices:
                momentum[rank] += numel
                update[rank] = max(update[rank], update_bytes(matrices[name], Dtype.BF16, "cuda"))
    best: dict[tuple[int, ...], int] = {}
    for rank in range(degree):
        rest = freed[rank], momentum[rank], update[rank]
        best.setdefault((touched[rank], slices[rank], early[rank], *rest), rank)
    kept: list[tuple[int, ...]] = []
    for key in sorted(best, reverse=True):  # none after it can cover one
        if not any(_covers(other, key) for other in kept):
            kept.append(key)
    return sorted(best[key] for key in kept)


def _covers(other: tuple[int, ...], key: tuple[int, ...]) -> bool:
    return all(a >= b for a, b in zip(other, key, strict=True))
