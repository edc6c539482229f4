"""ZeRO-1 and ZeRO-2 (deepspeed 0.19.8, runtime/zero/stage_1_and_2.py): flat weights, partitioned fp32 states."""

from __future__ import annotations

from vramplan.memory import labels
from vramplan.memory.activations import backward_candidates, highest
from vramplan.memory.engine import Engine, Micro
from vramplan.memory.job import Job
from vramplan.memory.moments import Bytes, Stretch, at_point, merged, without_gradient
from vramplan.memory.optimizers import optimizer_bytes
from vramplan.memory.partition import Flush, flat_group, flushes
from vramplan.memory.size import evaluate
from vramplan.memory.term import Phase


class Zero12(Engine):
    """Stage 1 keeps whole gradients until the accumulation boundary; stage 2 reduces each as it appears."""

    def __init__(self, job: Job, rank: int) -> None:
        super().__init__(job, rank)
        self.flat = flat_group(self.trained, job.degree)
        self.share = self.flat.partition_numel
        self.contiguous = job.zero.contiguous_gradients
        self.bucket_bytes = self._bucket_bytes()
        owned = [name for name, _ in self.trained if self.flat.owned_by(name, rank)]
        sizes = dict(self.trained)
        self.partition_bytes = self.width * sum(sizes[name] for name in owned)
        self.num_owned = len(owned)
        self.largest_owned = max((self.flat.owned_by(name, rank) for name in owned), default=0)
        self.optimizer = optimizer_bytes(job.optimizer, job.device)
        self.largest = max((numel for _, numel in self.trained), default=0)
        self.offloads = job.offload_optimizer

    def _bucket_bytes(self) -> int:
        """Buffers of ``setup_buckets``: one a communication dtype, two each where reduction overlaps backward."""
        job = self.job
        if not job.zero.contiguous_gradients:
            return 0
        kinds = 1
        if job.autocast is not None:  # torch_autocast.py: nn.Linear's parameters travel in the low precision
            kinds = len({param.in_linear for param in job.parameters if param.trained})
        buffers = kinds * (2 if job.zero.overlap_comm else 1)
        return buffers * job.zero.reduce_bucket_size * self.width

    def init(self) -> None:
        stretch = self.open("engine_init", Phase.ENGINE_INIT)
        width, frozen = self.width, {labels.FROZEN: self.frozen_bytes}
        flat = {labels.WEIGHTS: self.flat.padded_numel * width}
        stretch.see("weights flattened", merged(frozen, flat, {labels.INIT: self.trained_numel * width}))
        clone = {labels.INIT: self.share * width}
        if self.offloads:
            self.resident = merged(frozen, flat, self._offloaded())
            stretch.see("master weights cast", merged(frozen, flat, clone))
            stretch.close(self.resident)
            return
        master = {labels.MASTER: self.share * self.master_bytes}
        stretch.see("master weights cast", merged(frozen, flat, master, clone))
        probe = {labels.INIT: self.share * self.master_bytes}
        stretch.see("a gradient partition is tried", merged(frozen, flat, master, probe))
        self.resident = merged(frozen, flat, master)
        stretch.close(self.resident)

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

    def _partition(self) -> Bytes:
        """The rank's reduced gradients on the device; with offload they go to the host at once."""
        return {} if self.offloads else {labels.GRAD_PARTITION: self.partition_bytes}

    def backward(self, micro: Micro) -> None:
        stretch = self.open(micro.phase("backward"), Phase.BACKWARD, micro.step)
        if self.job.stage == 1:
            self._backward_keeping(stretch, micro)
        elif self.contiguous:
            self._backward_reducing(stretch, micro)
        else:
            self._backward_holding(stretch, micro)

    def _backward_keeping(self, stretch: Stretch, micro: Micro) -> None:
        """Stage 1: ``param.grad`` stays; the bucket is there from the first gradient until the boundary's end."""
        early, late = backward_candidates(self.job.model_run, self.width if micro.first else 0)
        bucket = {labels.BUCKET: self.bucket_bytes}
        for group, extra in ((early, {}), (late, bucket if micro.first else {})):
            point = highest(group, self.basis)
            if point is not None:
                kept = {labels.GRADIENTS: self.width * point.grad_numel} if micro.first else {}
                stretch.see(point.where, merged(self.resident, extra, kept, at_point(point, self.basis)))
        rest = self.after_backward()
        grads = {labels.GRADIENTS: self.width * self.trained_numel}
        self.resident.pop(labels.BUCKET, None)
        self.resident.pop(labels.GRADIENTS, None)
        if not micro.boundary:
            self.resident = merged(self.resident, grads, bucket)
        else:
            self._reduce_all(stretch, merged(self.resident, rest), bucket)
            self.resident = merged(self.resident, self._partition())
        self.outputs = rest
        stretch.close(merged(self.resident, rest))

    def _reduce_all(self, stretch: Stretch, base: Bytes, bucket: Bytes) -> None:
        """Stage 1's boundary: gradients move into the bucket in the order of the parameters, a bucket at a time."""
        order = tuple(name for name, _ in self.trained)
        left = self.trained_numel * self.width
        stretch.see("before reduction", merged(base, bucket, {labels.GRADIENTS: left}))
        filled: Bytes = {}
        for flush in flushes(order, self.trained, self.job.degree, self.job.zero.reduce_bucket_size):
            moves = self.contiguous and flush.numel <= self.job.zero.reduce_bucket_size
            left -= flush.numel * self.width if moves else 0
            copy = {labels.REDUCTION: flush.numel * self.width if flush.copies else 0}
            stretch.see("gradient reduction", merged(base, bucket, filled, copy, {labels.GRADIENTS: left}))
            if self.contiguous and self.rank in flush.ranks:
                filled = self._partition()
                # a gradient that bypassed the bucket is let go of once it is in the partition, else at the end
                left -= 0 if moves else flush.numel * self.width
            stretch.see("gradient partition filled", merged(base, bucket, filled, {labels.GRADIENTS: left}))

    def _backward_reducing(self, stretch: Stretch, micro: Micro) -> None:
        """Stage 2: each gradient moves into the bucket; full buckets are reduced on the way."""
        run = self.job.model_run
        early, late = backward_candidates(run, 0)
        bucket = {labels.BUCKET: self.bucket_bytes}
        point = highest(early, self.basis)
        if point is not None:
            stretch.see(point.where, merged(self.resident, at_point(point, self.basis)))
        filled_from = self._see_flushes(stretch, bucket)
        point = highest(late, self.basis)
        if point is not None:
            stretch.see(point.where, merged(self.resident, bucket, at_point(point, self.basis)))
        if filled_from is not None:
            after = tuple(each for each in late if each[1].index >= filled_from)
            point = highest(after, self.basis)
            if point is not None:
                filled = self._partition()
                stretch.see(point.where, merged(self.resident, bucket, filled, at_point(point, self.basis)))
        self._end_of_reduction(stretch, micro)

    def _backward_holding(self, stretch: Stretch, micro: Micro) -> None:
        """Stage 2 without a contiguous bucket: gradients stay ``param.grad`` until as many as a bucket holds are
        reduced; then those of other ranks go (``reduce_ipg_grads``, ``buffered_reduce_fallback``)."""
        job, found = self.job, self.profile
        gradients, owned = found.gradients, 0
        start = held_from = 0
        order = tuple(gradient.name for gradient in gradients)
        for flush in flushes(order, self.trained, job.degree, job.zero.reduce_bucket_size):
            last = len(gradients) - 1 if flush.before is None else flush.before
            until = len(found.backward) if flush.before is None else gradients[last].at.index
            self._see_held(stretch, start, until, owned - held_from)
            kept = owned + flush.numel
            alive = at_point(gradients[last].at, self.basis)
            if flush.before is None:
                alive = without_gradient(alive, gradients[last].numel * self.width)
            parts = {labels.GRADIENTS: kept * self.width, labels.REDUCTION: flush.numel * self.width}
            stretch.see("gradient reduction", merged(self.resident, alive, parts))
            end = len(order) if flush.before is None else flush.before
            owned = sum(each.numel for each in gradients[:end] if self.flat.owned_by(each.name, self.rank))
            held_from, start = sum(each.numel for each in gradients[:end]), until
        self._end_of_reduction(stretch, micro)

    def _see_held(self, stretch: Stretch, start: int, until: int, offset_numel: int) -> None:
        """Instants ``start`` to ``until`` of backward with the gradients held then: those delivered and an offset."""
        points = [point for point in self.profile.backward if start <= point.index < until]
        if not points:
            return
        width = self.width
        most = max(points, key=lambda each: evaluate(each.total, self.basis) + width * each.grad_numel)
        held = {labels.GRADIENTS: width * (most.grad_numel + offset_numel)}
        stretch.see(most.where, merged(self.resident, held, at_point(most, self.basis)))

    def _see_flushes(self, stretch: Stretch, bucket: Bytes) -> int | None:
        """Instants of reductions; returns the allocation from which the rank's gradient partition is there."""
        job, gradients = self.job, self.profile.gradients
        order = tuple(gradient.name for gradient in gradients)
        filled: Bytes = {}
        filled_from: int | None = None
        for flush in flushes(order, self.trained, job.degree, job.zero.reduce_bucket_size):
            last = len(gradients) - 1 if flush.before is None else flush.before
            gradient = gradients[last]
            alive = at_point(gradient.at, self.basis)
            if flush.numel > job.zero.reduce_bucket_size:
                alive = self._with_oversized(stretch, flush, merged(bucket, filled), alive)
            elif flush.before is None:  # the last gradient has moved into the bucket
                alive = without_gradient(alive, gradient.numel * self.width)
            copy = {labels.REDUCTION: self._copy_bytes(flush)}
            stretch.see("gradient reduction", merged(self.resident, bucket, filled, copy, alive))
            if self.rank in flush.ranks and self.offloads:  # set_norm_for_param_grad_in_gpu
                norm = {labels.NORM: 8 * self.largest_owned}
                stretch.see("gradient norm", merged(self.resident, bucket, norm, alive))
            elif self.rank in flush.ranks and not filled:
                filled = self._partition()
                filled_from = gradient.at.index
            stretch.see("gradient partition filled", merged(self.resident, bucket, filled, alive))
        return filled_from

    def _with_oversized(self, stretch: Stretch, flush: Flush, extra: Bytes, alive: Bytes) -> Bytes:
        """A gradient larger than the bucket bypasses it and stays ``param.grad`` until the next one arrives
        (``extra_large_param_to_reduce``); returns what is alive at its reduction."""
        if flush.before is None:
            return alive
        gradients = self.profile.gradients
        waiting = {labels.GRADIENTS: flush.numel * self.width}
        since, until = gradients[flush.before - 1].at.index, gradients[flush.before].at.index
        between = [point for point in self.profile.backward if since <= point.index < until]
        if between:
            point = max(between, key=lambda each: evaluate(each.total, self.basis))
            stretch.see(point.where, merged(self.resident, extra, waiting, at_point(point, self.basis)))
        return merged(alive, waiting)

    def _copy_bytes(self, flush: Flush) -> int:
        width = self.width
        if self.job.layout.sp > 1:  # allreduce_bucket reduces in fp32 under sequence parallelism
            width += 4 if width != 4 else 0
        return flush.numel * width if flush.copies else 0

    def _end_of_reduction(self, stretch: Stretch, micro: Micro) -> None:
        rest = self.after_backward()
        partition = self.partition_bytes
        self.resident.pop(labels.ACCUMULATED, None)
        self.resident.pop(labels.GRAD_PARTITION, None)
        if self.offloads:
            if not micro.boundary or micro.index > 1:
                self.resident[labels.HOST_ACCUMULATED] = partition
        elif micro.boundary:
            self.resident = merged(self.resident, {labels.GRAD_PARTITION: partition})
        else:
            self.resident = merged(self.resident, {labels.ACCUMULATED: partition})
        self.outputs = rest
        stretch.close(merged(self.resident, rest))

    def step(self, micro: Micro) -> None:
        stretch = self.open(micro.phase("optimizer_step"), Phase.OPTIMIZER_STEP, micro.step)
        if not micro.boundary:
            stretch.close(merged(self.resident, self.outputs))
            return
        base = merged(self.resident, self.outputs)
        if self.offloads:
            if micro.step == 1:
                self.resident = merged(self.resident, {labels.HOST_MOMENTS: self.share * self.optimizer.state})
            stretch.close(merged(self.resident, self.outputs))
            return
        stretch.see("gradient norm", merged(base, {labels.NORM: 8 * self.largest_owned}))
        flat = {labels.FLAT_GRAD: self.share * self.master_bytes}
        joined = {labels.REDUCTION: self.share * self.width if self.num_owned > 1 else 0}
        if self.width == self.master_bytes:  # the flattened gradient is already in the master's format
            joined = {}
        stretch.see("gradients flattened", merged(base, flat, joined))
        self.resident.pop(labels.GRAD_PARTITION, None)
        states = {labels.MOMENTS: self.share * self.optimizer.state}
        if micro.step == 1:
            self.resident = merged(self.resident, states)
        scratch = {labels.STEP_SCRATCH: self.share * self.optimizer.scratch}
        stretch.see("optimizer update", merged(self.resident, self.outputs, flat, scratch))
        stretch.close(merged(self.resident, self.outputs))
