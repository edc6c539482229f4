"""ZeRO-1 and ZeRO-2 (deepspeed 0.19.8, runtime/zero/stage_1_and_2.py): flat weights, partitioned fp32 states."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from functools import cached_property
from itertools import accumulate

from vramplan.facts.dtype import Dtype
from vramplan.memory import labels
from vramplan.memory.activations import backward_candidates, undominated
from vramplan.memory.between import Files
from vramplan.memory.engine import Engine, Micro
from vramplan.memory.job import Job
from vramplan.memory.moments import Bytes, Instant, Parts, Stretch, at_point, merged
from vramplan.memory.partition import Flush, copied_bytes, flat_of, flushes, reduces_of, see_flattened
from vramplan.memory.size import ZERO, add, const
from vramplan.memory.tape import Point
from vramplan.memory.term import Phase
from vramplan.memory.waiting import History, Wait, left_at, stretches, waiting_meanwhile, waits_of


class Zero12(Engine):
    """Stage 1 keeps whole gradients until the accumulation boundary; stage 2 reduces each as it appears."""

    def __init__(self, job: Job, rank: int) -> None:
        super().__init__(job, rank)
        self.flat = flat_of(job)
        self.share = self.flat.partition_numel
        self.contiguous = job.zero.contiguous_gradients or job.offload_optimizer
        self.reduces = reduces_of(job)
        self.bucket_bytes = self._bucket_bytes()
        self.owned = self.flat.owned(rank)
        self.sizes = dict(self.trained)
        self.partition_bytes = self._whole_bytes(self.owned)
        self.largest_owned = max(self.owned.values(), default=0)
        self.optimizer = self.optimizer_on("cpu" if job.offload_optimizer else job.device)
        self.largest = max((numel for _, numel in self.trained), default=0)
        self.offloads = self.sends = job.offload_optimizer
        """Whether states lie in the host's memory, and whether gradients go there as they are reduced."""
        self._reducing: dict[Hashable, list[Instant]] = {}

    def _whole_bytes(self, names: Iterable[str]) -> int:
        """The gradients of those of the parameters that lie in the rank's partition at least in part, whole."""
        return self.width * sum(self.sizes[name] for name in names if name in self.owned)

    def _norm_bytes(self, names: Iterable[str]) -> int:
        """The largest slice that the rank owns of the parameters, in fp64 (``set_norm_for_param_grad_in_gpu``)."""
        return 8 * max((self.owned.get(name, 0) for name in names), default=0)

    def _bucket_bytes(self) -> int:
        """Buffers of ``setup_buckets``: one a communication dtype, two each where reduction overlaps backward."""
        if not self.contiguous:
            return 0
        zero, kinds = self.job.zero, len({name in self.lowered for name, _ in self.trained})
        return kinds * (2 if zero.overlap_comm else 1) * zero.reduce_bucket_size * self.width

    def init(self) -> None:
        stretch = self.open("engine_init", Phase.ENGINE_INIT)
        self.see_split(stretch)
        width, frozen = self.width, {labels.FROZEN: self.frozen_bytes}
        flat = {labels.WEIGHTS: self.flat.padded_numel * width}
        see_flattened(stretch, self.job, self.flat, self.frozen_bytes)
        if self.offloads:
            self.resident = merged(frozen, flat, self._offloaded())
        else:
            self.resident = merged(frozen, flat, {labels.MASTER: self.share * self.master_bytes})
            stretch.see("a gradient partition is tried", self.resident, {labels.INIT: self.share * self.master_bytes})
        stretch.close(self.resident)

    def files(self) -> Files:
        """Weights as views of the flat buffer, which is written once; each rank's master and states."""
        weights = self.flat.padded_numel * self.width
        own = self.share * self.master_bytes + self.optimizer.state_bytes(*self.flat.partitions)
        largest = max(self.flat.partitions)
        return Files(weights, own, largest * self.flat.degree * self.width, largest * self.master_bytes)

    def _offloaded(self) -> Bytes:
        """Master, gradients and staging in the host's memory, and one buffer on the device (``__init__``)."""
        master, low, temporary = self.share * self.master_bytes, self.share * self.width, self.largest * self.width
        parts = {
            labels.HOST_MASTER: master,
            labels.HOST_GRAD: master,
            labels.HOST_STAGING: low + temporary,
            labels.OFFLOAD_BUFFER: temporary,
        }
        return merged(parts, self.pinned_rounding(master, master, low, temporary))

    def _rounded_sums(self) -> dict[str, int]:
        """What pinning adds to the sums, each of which is a block of its own."""
        blocks = [self._whole_bytes([name]) for name in self.owned]
        return {labels.HOST_SUMS_PINNED: max(0, self.pinned(*blocks) - sum(blocks))}

    def _partition(self) -> dict[str, int]:
        """The rank's reduced gradients on the device; with offload they go to the host at once."""
        return {} if self.sends else {labels.GRAD_PARTITION: self.partition_bytes}

    def backward(self, micro: Micro) -> None:
        stretch = self.open(micro.phase("backward"), Phase.BACKWARD, micro.step)
        if self.job.stage == 1 and not (self.job.zero.overlap_comm and micro.boundary):
            self._backward_keeping(stretch, micro)
        else:
            self._backward_reducing(stretch, micro)

    def _backward_keeping(self, stretch: Stretch, micro: Micro) -> None:
        """Stage 1: ``param.grad`` stays; the bucket is there from the first gradient until the boundary's end."""
        early, late = backward_candidates(self.model_run, self.width if micro.first else 0)
        bucket = {labels.BUCKET: self.bucket_bytes}
        for group, extra in ((early, {}), (late, {} if labels.BUCKET in self.resident else bucket)):
            for _, point in group:
                kept = {labels.GRADIENTS: self.width * point.grad_numel} if micro.first else {}
                stretch.see(point.where, self.resident, extra, kept, at_point(point))
        rest = self.after_backward()
        self.resident = self.resident.without(labels.BUCKET, labels.GRADIENTS)
        if micro.boundary and self.job.managed:
            self._reduce_all(stretch, rest, bucket)
        else:
            self.resident = merged(self.resident, {labels.GRADIENTS: self.width * self.trained_numel}, bucket)
        self.outputs = rest
        stretch.close(self.resident, rest)

    def _reduce_all(self, stretch: Stretch, outputs: Bytes, bucket: Parts) -> None:
        """Stage 1's boundary: gradients move into the bucket in the order of the parameters, a bucket at a time."""
        name, parts, waiting = self._boundary
        stretch.see(name, self.resident, outputs, bucket, parts)
        self.resident = merged(self.resident, self._partition())
        self._finish(stretch, outputs, bucket, {labels.GRADIENTS: waiting})

    @cached_property
    def _boundary(self) -> tuple[str, dict[str, int], int]:
        """Its highest instant, what is alive in that, and the bytes of gradients that are still there at its end."""
        arriving = [each for group in self.job.groups for each in group]
        most, whole = self.job.zero.reduce_bucket_size, self.trained_numel * self.width
        moved_before = list(accumulate((numel if numel <= most else 0 for _, numel in arriving), initial=0))
        instants: list[tuple[int, str, int, int, int]] = [(whole, "before reduction", whole, 0, 0)]
        partition, filled, gone = sum(self._partition().values()), 0, 0
        for flush in self._flushes(tuple(name for name, _ in arriving)):
            moves = self.contiguous and flush.numel <= most
            # whatever came before, into either bucket, has moved there
            moved = moved_before[-1 if flush.before is None else flush.before] if self.contiguous else 0
            left = whole - moved * self.width - gone
            if self.offloads and not moves:  # _offload_gradient_safety_enabled: it gets a storage of its own
                clone = flush.numel * self.width
                instants.append((left + clone, "a large gradient copied", left, 0, clone))
            copy = self._copy_bytes(flush)
            instants.append((left + filled + copy, "gradient reduction", left, filled, copy))
            if self.contiguous and self.rank in flush.ranks:
                filled = partition
            instants.append((left + filled, "gradient partition filled", left, filled, 0))
            if self.contiguous and self.rank in flush.ranks and not moves:
                # a gradient that bypassed the bucket is let go of after it is in the partition, else at the end
                gone, left = gone + flush.numel * self.width, left - flush.numel * self.width
            if self.sends and self.rank in flush.ranks:
                own = left if moves else left + flush.numel * self.width
                instants.append((own + (norm := self._norm_bytes(flush.held)), "gradient norm", own, 0, -norm))
        # they differ by plain bytes, so the highest is highest for every batch
        waiting, (_, name, left, filled, copy) = left * self.contiguous, max(instants, key=lambda each: each[0])
        scratch = labels.REDUCTION if copy >= 0 else labels.NORM
        return name, {labels.GRADIENTS: left, labels.GRAD_PARTITION: filled, scratch: abs(copy)}, waiting

    def _backward_reducing(self, stretch: Stretch, micro: Micro) -> None:
        """Stage 2, and the boundary of stage 1 where that overlaps: each gradient moves into the bucket; full buckets
        are reduced on the way."""
        left = self._left_width(micro)
        bucket = {labels.BUCKET: self.bucket_bytes}
        self.resident = self.resident.without(*([labels.BUCKET, labels.GRADIENTS] if self.job.stage == 1 else []))
        early, _ = backward_candidates(self.model_run, -left)
        for _, point in early:
            stretch.see(point.where, self.resident, bucket if left else {}, self._alive(point, left))
        normed = self.sends and micro.boundary and self.job.managed
        fresh = self._accumulates(micro) and labels.HOST_ACCUMULATED not in self.resident
        if (kind := (self.model_run, normed, fresh, left)) not in self._reducing:
            self._reducing[kind] = self._reduction_instants(normed, fresh, left)
        base = merged(self.resident, bucket)
        for instant in self._reducing[kind]:
            stretch.see(instant.name, base, *instant.many)
        self._end_of_reduction(stretch, micro)

    def _left_width(self, micro: Micro) -> int:
        """Bytes an element of gradients of earlier micro-batches that stay until backward adds to them and moves them
        on (stage 1); 0: there are none."""
        return self.width if self.job.stage == 1 and not micro.first else 0

    def _alive(self, point: Point, left: int) -> Bytes:
        """What is alive at an instant, with the gradients that are still where earlier micro-batches left them."""
        if not left:
            return at_point(point)
        return merged(at_point(point), {labels.GRADIENTS: left * (self.trained_numel - point.grad_numel)})

    def _accumulates(self, micro: Micro) -> bool:
        """Whether gradients are added up in the host's memory (``copy_grads_in_partition``), but in a bf16 master's."""
        wide = self.job.master_dtype is Dtype.FP32
        return self.sends and self.job.stage == 2 and wide and not (self.job.managed and micro.boundary and micro.first)

    def _reduction_instants(self, normed: bool, fresh: bool, left: int) -> list[Instant]:
        """Instants from the first gradient on that can be highest, without what is resident. ``normed``: norms are
        taken on the way; ``fresh``: the host's sums come to be on the way; ``left``: as ``_left_width`` says."""
        found = Stretch("", Phase.BACKWARD, False, host_apart=self.job.device != "cpu")
        _, late = backward_candidates(self.model_run, -left)
        filled_from = self._see_flushes(found, normed, fresh, left)
        for _, point in late:
            found.see(point.where, self._alive(point, left))
        if filled_from is not None:
            self._see_since(found, filled_from, self._partition(), left)
        return found.instants

    def _see_since(self, stretch: Stretch, index: int, extra: Parts, left: int) -> None:
        """Every instant of backward from one on, with what has come to be there."""
        after = [point for point in self.profile.backward if point.index >= index]
        for _, point in undominated([(add(each.total, const(-left * each.grad_numel)), each) for each in after]):
            stretch.see(point.where, extra, self._alive(point, left))

    def _see_flushes(self, stretch: Stretch, normed: bool, fresh: bool, left: int) -> int | None:
        """Instants of reductions; returns the allocation from which the rank's gradient partition is there."""
        job, gradients = self.job, self.profile.gradients
        done = self._flushes(names := tuple(each.name for each in gradients))
        waits = waits_of(done, names, job.zero.reduce_bucket_size, self.width)
        filled, filled_from = dict[str, int](), None
        history: History = [(0, filled)]
        for number, (flush, wait) in enumerate(zip(done, waits, strict=True)):
            at = self.profile.graph_done if flush.before is None else gradients[flush.before].at
            others = waiting_meanwhile(waits[number + 1 :], wait.stop)
            after = merged(self._alive(at, left), {labels.GRADIENTS: others})
            alive, oversized = merged(after, {labels.GRADIENTS: wait.num_bytes}), wait.num_bytes > 0
            before = {**filled, **self._made_first(flush), labels.REDUCTION: self._copy_bytes(flush)}
            if self.rank in flush.ranks and self.sends:  # large ones stay while the boundary is not known yet
                stays = oversized and not normed and flush.before is not None
                filled = self._sent_away(filled, flush, fresh, stays=stays)
                after = after if stays else alive  # what stays is in filled now
                norm = {labels.NORM: self._norm_bytes(flush.held) if normed else 0}
                stretch.see("gradient norm" if normed else "gradients sent to the host", filled, norm, after)
                self._see_until_next(stretch, flush, filled, left)
            else:
                if self.rank in flush.ranks and filled_from is None:
                    filled, filled_from = {**filled, **self._partition()}, at.index
                if oversized and self._stays_whole(flush):  # nobody lets go of it before the end
                    filled = {**filled, labels.GRADIENTS: filled.get(labels.GRADIENTS, 0) + wait.num_bytes}
                else:
                    after = alive
            if not self.sends and labels.GRADIENTS in filled:
                self._see_until_next(stretch, flush, filled, left)
            if sum(before.values()) >= sum(filled.values()) - wait.num_bytes * (after is not alive):
                stretch.see("gradient reduction", before, alive)
            else:
                stretch.see("gradient partition filled", filled, after)
            history.append((wait.stop, filled))
        self._see_waiting(stretch, history, waits, left)
        return filled_from

    def _made_first(self, flush: Flush) -> dict[str, int]:
        return {}  # before it reduces (``wide_sums.py``)

    def _stays_whole(self, flush: Flush) -> bool:
        """Whether a gradient that is larger than the bucket stays after its reduction."""
        return self.job.stage == 1 and self.rank not in flush.ranks

    def _sent_away(self, filled: dict[str, int], flush: Flush, fresh: bool, stays: bool) -> dict[str, int]:
        """What a reduction leaves with offload: sums in the host's memory, and a large gradient that ``stays``."""
        sums = filled.get(labels.HOST_ACCUMULATED, 0) + (self._whole_bytes(flush.held) if fresh else 0)
        kept = filled.get(labels.GRADIENTS, 0) + flush.numel * self.width * stays
        return {labels.HOST_ACCUMULATED: sums, labels.GRADIENTS: kept}

    def _see_until_next(self, stretch: Stretch, flush: Flush, filled: Parts, left: int) -> None:
        """Instants after a reduction with what it leaves; later ones leave at least as much."""
        if flush.before is not None:
            self._see_since(stretch, self.profile.gradients[flush.before].at.index, filled, left)

    def _see_waiting(self, stretch: Stretch, history: History, waits: list[Wait], left: int) -> None:
        """Instants of backward while large gradients wait; with offload each is cloned as it arrives."""
        for wait in waits:
            if self.offloads and wait.num_bytes:
                beside = sum(other.num_bytes for other in waits if other.start < wait.start < other.stop)
                parts = {labels.REDUCTION: wait.num_bytes, labels.GRADIENTS: beside}
                alive = self._alive(self.profile.gradients[wait.start].at, left)
                stretch.see("a large gradient copied", left_at(history, wait.start), parts, alive)
        for since, end, extra, num_bytes in stretches(history, waits, self.profile):
            between = [point for point in self.profile.backward if since <= point.index < end]
            for _, point in undominated([(add(each.total, const(-left * each.grad_numel)), each) for each in between]):
                stretch.see(point.where, extra, {labels.GRADIENTS: num_bytes}, self._alive(point, left))

    def _flushes(self, order: tuple[str, ...]) -> tuple[Flush, ...]:
        return flushes(order, self.flat, self.job.zero.reduce_bucket_size, self.lowered, self.reduces)

    def _copy_bytes(self, flush: Flush) -> int:
        return copied_bytes(flush, self.job, self.reduces)

    def _end_of_reduction(self, stretch: Stretch, micro: Micro) -> None:
        rest, partition = self.after_backward(), self.partition_bytes
        self.resident = self.resident.without(labels.ACCUMULATED, labels.GRAD_PARTITION)
        if self.sends:
            if self._accumulates(micro):
                sums = {labels.HOST_ACCUMULATED: partition, **self._rounded_sums()}
                self.resident = merged(self.resident.without(labels.HOST_ACCUMULATED, labels.HOST_SUMS_PINNED), sums)
        elif micro.boundary:
            self.resident = merged(self.resident, {labels.GRAD_PARTITION: partition})
            if self.job.managed:
                self._finish(stretch, rest, {labels.BUCKET: self.bucket_bytes})
        else:
            self.resident = merged(self.resident, {labels.ACCUMULATED: partition})
        self.outputs = rest
        stretch.close(self.resident, rest)

    def step(self, micro: Micro) -> None:
        stretch = self.open(micro.phase("optimizer_step"), Phase.OPTIMIZER_STEP, micro.step)
        if not micro.boundary:
            stretch.close(self.resident, self.outputs)
            return
        if self.job.stage == 1 and not self.job.managed:
            self.resident = self.resident.without(labels.BUCKET, labels.GRADIENTS)
            self._reduce_all(stretch, self.outputs, {labels.BUCKET: self.bucket_bytes})
        if self.offloads:
            if self.job.stage == 2 and not self.job.managed:
                self._see_finalised(stretch, merged(self.resident, self.outputs))
            self._step_on_host(stretch, micro.step == 1)
            stretch.close(self.resident, self.outputs)
            return
        if self.job.stage == 2 and not self.job.managed:
            self._finish(stretch, self.outputs)
        stretch.see("gradient norm", self.resident, self.outputs, {labels.NORM: 8 * self.largest_owned})
        for index in range(len(self.flat.partitions)):
            self._update(stretch, index, micro.step == 1)
        stretch.close(self.resident, self.outputs)

    def _step_on_host(self, stretch: Stretch, first: bool) -> None:
        """The groups' steps in the host's memory; in the first states come to be group by group."""
        for index, share in enumerate(self.flat.partitions):
            if first:
                moments = self.optimizer.state_bytes(*self.flat.partitions[: index + 1])
                self.resident = merged(self.resident.without(labels.HOST_MOMENTS), {labels.HOST_MOMENTS: moments})
            scratch = {labels.HOST_SCRATCH: share * self.optimizer.scratch}
            stretch.see("optimizer update", self.resident, self.outputs, scratch)

    def _finish(self, stretch: Stretch, *alive: Parts) -> None:
        """What is made of the rank's gradients at the boundary, before their norm: nothing."""

    def _update(self, stretch: Stretch, index: int, first: bool) -> None:
        """One group's step: its gradients are flattened and cast, and let go of with its update."""
        share, is_last = self.flat.partitions[index], index + 1 == len(self.flat.partitions)
        names = [name for name, _ in self.job.groups[index] if name in self.owned]
        lone = self.width == self.master_bytes and [self.owned[name] for name in names] == [share]
        # a lone gradient in the master's format is not copied to be flattened: all that it is a part of stays
        flat = {labels.FLAT_GRAD: 0 if lone else share * self.master_bytes}
        joined = {labels.REDUCTION: share * self.width if len(names) > 1 and self.width != self.master_bytes else 0}
        stretch.see("gradients flattened", self.resident, self.outputs, flat, joined)
        # one buffer for all groups goes with the last (grads_in_partition)
        whole = self.resident.get(labels.GRAD_PARTITION, ZERO)[0]
        left = 0 if is_last else whole - (0 if self.contiguous else self._whole_bytes(names))
        viewed = {labels.GRAD_PARTITION: whole - left if lone else 0}
        self.resident = merged(self.resident.without(labels.GRAD_PARTITION), {labels.GRAD_PARTITION: left})
        if first:
            states = self.moments(self.optimizer, *self.flat.partitions[: index + 1])
            self.resident = merged(self.resident.without(labels.MOMENTS, labels.HOST_PAGED), states)
        scratch = {labels.STEP_SCRATCH: share * self.optimizer.scratch}
        stretch.see("optimizer update", self.resident, self.outputs, flat, viewed, scratch)

    def _see_finalised(self, stretch: Stretch, base: Bytes) -> None:
        """Each sum comes back to the device whole, and the norm of the rank's slice of it is taken
        (``_finalize_cpu_offload_gradient_accumulation``)."""
        bytes_of = {name: self._whole_bytes([name]) + self._norm_bytes([name]) for name in self.owned}
        if bytes_of:
            name = max(bytes_of, key=lambda each: bytes_of[each])
            parts = {labels.GRADIENTS: self._whole_bytes([name]), labels.NORM: self._norm_bytes([name])}
            stretch.see("gradient norm", base, parts)
