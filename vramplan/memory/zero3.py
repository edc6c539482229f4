"""ZeRO-3 (deepspeed 0.19.8, runtime/zero/stage3.py): every tensor cut into equal parts, whole only while it is used."""

from __future__ import annotations

from collections.abc import Iterator

from vramplan.memory import labels
from vramplan.memory.activations import undominated
from vramplan.memory.between import Files, Written
from vramplan.memory.cut import (
    highest_as_built,
    highest_as_engine_starts,
    highest_as_written,
    made_whole,
    see_read,
    tied_head_part,
)
from vramplan.memory.engine import Engine, Micro
from vramplan.memory.gathered import MICROS, GatheredProfiles, gathered_profiles
from vramplan.memory.gathers import second_part
from vramplan.memory.job import Job
from vramplan.memory.moments import Bytes, Parts, Stretch, at_point, merged
from vramplan.memory.profile import Profile
from vramplan.memory.quantized import nf4_state_bytes
from vramplan.memory.reduction import Bucket, BucketFlush, bucket_flushes, sub_groups
from vramplan.memory.size import ZERO, add, const
from vramplan.memory.tape import Point
from vramplan.memory.term import Phase
from vramplan.memory.waiting import Wait, stretches, waiting_meanwhile
from vramplan.spec.layout import shard
from vramplan.spec.trainable import LoraMethod

NORM_CHUNK = 250_000_000
"""Elements that ``_constant_buffered_norm2`` widens at once."""


class Zero3(Engine):
    """Weights, gradients and states are partitioned tensor by tensor; gathers come from the profile."""

    def __init__(self, job: Job, rank: int, steps_skipped: bool = False) -> None:
        super().__init__(job, rank)
        self.steps_skipped = steps_skipped
        degree, params = job.degree, job.parameters
        self.trained_share = sum(count * shard(numel, degree) for numel, count in job.numels(trained=True))
        self.frozen_share = sum(count * shard(numel, degree) for numel, count in job.numels(trained=False))
        self.four_bit_states = 0
        if job.quantized:
            self.frozen_share = sum(shard(job.cut_numel(param), degree) for param in params if not param.trained)
            self.four_bit_states = sum(nf4_state_bytes(param.numel) for param in params if job.is_quantized(param))
        self.largest_trained = max((numel for numel, _ in job.numels(trained=True)), default=0)
        self.largest_share = shard(self.largest_trained, degree)
        together = sub_groups(job.groups, degree, job.zero.sub_group_size)
        self.sub_groups = [sum(shard(numel, degree) for _, numel in each) for each in together]
        self.sub_group = max(self.sub_groups, default=0)
        self.lone = [len(each) == 1 for each in together]
        """Whether a sub-group is one parameter: flattening a single tensor copies nothing (torch/_utils.py)."""
        self.optimizer = self.optimizer_on("cpu" if job.offload_optimizer else job.device)
        self.profiles: GatheredProfiles = gathered_profiles(
            job.model_run, min(job.grad_accum_steps, MICROS), steps_skipped, job.sampling_run
        )
        self.grad_width = job.grad_dtype.nbytes
        self.frozen_second = sum(self._second(param.numel) for param in params if not param.trained) * self.width
        self.trained_width = (job.adapter_dtype or job.dtype).nbytes
        second = sum(self._second(param.numel) for param in params if param.trained) * self.trained_width
        self.second = {labels.SECONDARY: self.frozen_second + second}
        self.travels = job.grad_dtype.nbytes if job.communicates is None else job.communicates.nbytes

    def gathered(self) -> Parts:
        """Small tensors that are whole after a step (``_post_step``)."""
        return self.profiles.whole_between_steps

    def files(self) -> Files:
        """Master and states of each rank; the model's file holds no weights."""
        states = self.optimizer.state_bytes(self.trained_share)
        own = self.trained_share * self.master_bytes + states
        return Files(own=own, largest_own=self.sub_group * self.master_bytes)

    def written(self) -> Written:
        """Of trained tensors with adapters, else of all (``train/export.py``)."""
        only = isinstance(self.job.method, LoraMethod)
        params = (param for param in self.job.parameters if param.trained or not only)
        return highest_as_written(param.numel * self._width_of(param) for param in params)

    def _second(self, numel: int) -> int:
        """Elements of a tensor that stay on the rank besides its part (hpZ)."""
        return second_part(numel, self.job.degree, self.job.hpz) if self.job.hpz else 0

    def _stays(self, numel: int) -> int:
        """Elements of a tensor that stay on the rank between uses."""
        return shard(numel, self.job.degree) + self._second(numel)

    def _bucket_bytes(self) -> int:
        """One persistent bucket a communication dtype (``_setup_for_real_optimizer``)."""
        job, numel = self.job, self.job.zero.reduce_bucket_size
        if not job.zero.contiguous_gradients:
            return 0
        if job.autocast is None:
            return numel * self.travels
        trained = (param for param in job.parameters if param.trained)
        return numel * sum({job.autocast.nbytes if param.in_linear else self._width_of(param) for param in trained})

    def load(self) -> None:
        """``zero.Init``: every module is built whole and cut at once; adapters are added whole. Weights in 4 bits are
        made whole, and cut by the engine."""
        if self.job.quantized:
            super().load()
            return
        job, architecture = self.job, self.job.architecture
        base = [param for param in job.parameters if not param.trained or not isinstance(job.method, LoraMethod)]
        cut = sum(self._stays(param.numel) for param in base) * self.width
        if architecture.tied_embeddings:  # the head's own part stays until Python collects it, as the engine starts
            cut += self._stays(architecture.head.weight_numel) * self.width
        stretch = self.open("model_load", Phase.MODEL_LOAD)
        built = [(param.name, param.numel) for param in base]
        kept = 0 if job.offload_param and job.device != "cpu" else cut  # there each part goes to the host at once
        if not job.keep_outputs:  # a measured run builds from the config alone
            see_read(stretch, job, kept, built)
        if not kept:
            largest = max(param.numel for param in base) * self.width
            stretch.see("the largest tensor before it is cut", {labels.LOADING: largest})
        else:
            if architecture.tied_embeddings:
                built.append((f"{architecture.head.name}.weight", architecture.head.weight_numel))
            name, weights, loading = highest_as_built(job, built, self._stays)
            stretch.see(name, {labels.WEIGHTS: weights}, {labels.LOADING: loading})
        self._see_dora(stretch, kept, tensors=4)  # the weight too is whole (``gather_params_ctx``)
        stretch.close({labels.WEIGHTS: kept + made_whole(job)})

    def init(self) -> None:
        stretch, job = self.open("engine_init", Phase.ENGINE_INIT), self.job
        if job.quantized:
            stays = (lambda numel: 0) if job.offload_param and job.device != "cpu" else self._stays
            highest = highest_as_engine_starts(job, self.frozen_bytes, stays)
            stretch.see("a tensor before it is cut", {labels.WEIGHTS: highest})
        weights = {
            labels.FROZEN: self.frozen_share * self.width + self.four_bit_states,
            labels.WEIGHTS: self.trained_share * self.trained_width,
            **self.second,
        }
        # defragment: by way of a buffer in the host's memory, and one by one from the device
        copy = {labels.INIT: self.trained_share * self.trained_width if job.device == "cpu" else 0}
        if not job.offload_param:
            stretch.see("partitions moved together", weights, copy)
        if not job.quantized and (not job.offload_param or job.device != "cpu"):
            frozen = {labels.FROZEN: 0 if job.offload_param else self.frozen_share * self.width}
            stretch.see("adapters before they are cut", frozen, {labels.WEIGHTS: made_whole(job)})
        if job.offload_optimizer:
            self.resident = self._offloaded()
            # initialize_optimizer_states: a buffer that no sub-group takes, and the last one's gradients before they
            # are pinned; the bucket and the gradient partitions come after it
            states = self.resident.without(labels.BUCKET, labels.HOST_PARTITION)
            stretch.see("gradients of the states made", states, {labels.HOST_INIT: self._spare()})
        else:
            self._init_on_device(stretch, self._weights_on_host() if job.offload_param else weights)
        # create_reduce_and_remove_grad_hooks gathers each trained tensor to hang a hook on it
        gathered = {labels.GATHERED: self.largest_trained * self.trained_width}
        part = self._brought(self.largest_share * self.trained_width) if job.offload_param else {}
        stretch.see("the largest tensor gathered", self.resident, gathered, part)
        stretch.close(self.resident)

    def _spare(self) -> int:
        return self.sub_group * self.master_bytes * (1 if self.job.device == "cpu" else 2)

    def _init_on_device(self, stretch: Stretch, weights: Parts | Bytes) -> None:
        master = {labels.MASTER: self.trained_share * self.master_bytes}
        # what is tried, a zero gradient of the largest sub-group, is no less than the clone of any
        trial = {labels.INIT: self.sub_group * self.master_bytes}
        stretch.see("a gradient partition is tried", weights, master, trial)
        buffers = {labels.BUCKET: self._bucket_bytes(), labels.GRAD_PARTITION: self.trained_share * self.grad_width}
        self.resident = merged(weights, master, buffers)

    def _offloaded(self) -> Bytes:
        """States and gradients in the host's memory, and the weights too with ``offload_param``."""
        low, whole = self.trained_share * self.grad_width, self.trained_share * self.master_bytes
        frozen, weights = self.frozen_share * self.width, self.trained_share * self.trained_width
        on_device = {labels.FROZEN: frozen + self.four_bit_states, labels.WEIGHTS: weights, **self.second}
        parts = {
            labels.BUCKET: self._bucket_bytes(),
            labels.HOST_MASTER_PAGED: whole,
            labels.HOST_GRAD: whole,
            labels.HOST_PARTITION: low,
        }
        held = self._weights_on_host() if self.job.offload_param else merged(on_device)
        return merged(held, parts, self.pinned_rounding(whole, low))

    def _weights_on_host(self) -> Bytes:
        """The rank's parts of weights in the host's memory: the trained ones together."""
        frozen, weights = self.frozen_share * self.width, self.trained_share * self.trained_width
        cached = self.pinned(*self._parts(trained=True), tied_head_part(self.job))
        parts = {labels.HOST_WEIGHTS: frozen + weights, labels.HOST_CACHED: cached, **self.second}
        parts[labels.FROZEN] = self.four_bit_states
        return merged(parts, self.pinned_rounding(weights, *self._parts(trained=False)))

    def _parts(self, trained: bool) -> list[int]:
        """The rank's part of each trained or frozen tensor, in bytes."""
        width = self.trained_width if trained else self.width
        params = (param for param in self.job.parameters if param.trained is trained)
        return [shard(self.job.cut_numel(param), self.job.degree) * width for param in params]

    def _brought(self, num_bytes: int) -> Parts:
        """What is copied from the host to the device to be worked with."""
        return {labels.OFFLOAD_BUFFER: num_bytes} if self.job.device != "cpu" else {}

    def _profile_of(self, micro: Micro) -> Profile:
        found = self.profiles
        if self.sampling:
            return found.sampled[micro.index - 1]
        if micro.step == 1:
            return (found.first, found.following, found.settled)[min(micro.index, MICROS) - 1]
        return found.after_step if micro.first else found.following_later

    def forward(self, micro: Micro) -> None:
        stretch = self.open(micro.phase("forward"), Phase.FORWARD, micro.step)
        found = self._profile_of(micro)
        self._see_points(stretch, found.forward)
        self.end_forward(stretch, found)

    def _see_points(self, stretch: Stretch, points: tuple[Point, ...]) -> None:
        for _, point in undominated([(each.total, each) for each in points]):
            stretch.see(point.where, self.resident, at_point(point))

    def backward(self, micro: Micro) -> None:
        stretch = self.open(micro.phase("backward"), Phase.BACKWARD, micro.step)
        found = self._profile_of(micro)
        self._see_points(stretch, found.backward)
        bucket = Bucket(self.job.zero.reduce_bucket_size, self.job.degree)
        order = tuple((each.name, each.numel) for each in found.gradients)
        start = reduced = 0
        flushes = bucket_flushes(order, bucket, self.lowered)
        waits = [self._wait_of(flush, len(order)) for flush in flushes]
        if self.job.zero.contiguous_gradients:
            self._see_waiting(stretch, found, waits)
        for number, (flush, wait) in enumerate(zip(flushes, waits, strict=True)):
            held = None
            if not self.job.zero.contiguous_gradients:
                arrived = len(order) if flush.before is None else flush.before
                until = len(found.backward) if flush.before is None else found.gradients[flush.before].at.index
                self._see_held(stretch, found.backward[start:until], reduced)
                held = sum(numel for _, numel in order[:arrived]) - reduced
                start, reduced = until, reduced + flush.numel
            others = waiting_meanwhile(waits[number + 1 :], wait.stop)
            self._see_reduction(stretch, found, flush, micro.boundary and self.job.managed, held, others)
        self.outputs = at_point(found.backward_end)
        stretch.close(self.resident, self.outputs)

    def _wait_of(self, flush: BucketFlush, num_gradients: int) -> Wait:
        stop = num_gradients if flush.before is None else flush.before
        return Wait(flush.last, stop, flush.oversized * self.trained_width)

    def _see_waiting(self, stretch: Stretch, found: Profile, waits: list[Wait]) -> None:
        """Instants at which gradients that are larger than the bucket wait, each for the next that goes into its
        bucket."""
        for since, end, _, num_bytes in stretches([(0, {})], waits, found):
            between = [point for point in found.backward if since <= point.index < end]
            for _, point in undominated([(each.total, each) for each in between]):
                stretch.see(point.where, self.resident, {labels.GRADIENTS: num_bytes}, at_point(point))

    def _see_held(self, stretch: Stretch, points: tuple[Point, ...], reduced: int) -> None:
        """Instants at which, without a bucket, all gradients but the first ``reduced`` elements are held."""
        width = self.trained_width
        for _, point in undominated([(add(each.total, const(width * each.grad_numel)), each) for each in points]):
            held = {labels.GRADIENTS: width * (point.grad_numel - reduced)}
            stretch.see(point.where, self.resident, held, at_point(point))

    def _see_reduction(
        self, stretch: Stretch, found: Profile, flush: BucketFlush, normed: bool, held: int | None, others: int
    ) -> None:
        """``__avg_scatter_grads``, then ``partition_grads``.

        ``held``: elements of gradients that wait where there is no bucket; None where there is one, and ``others`` are
        the bytes of those that wait for the other format's.
        """
        width = self.trained_width
        alive = at_point(found.graph_done if flush.before is None else found.gradients[flush.before].at)
        outside = flush.oversized if held is None else flush.numel
        waiting = {labels.GRADIENTS: width * held if held is not None else width * outside + others}
        travels = self.job.autocast.nbytes if flush.lowered and self.job.autocast is not None else self.travels
        # what lies in the bucket has its format already; what does not is cast
        cast = outside * travels if travels != width else 0
        returns = self.grad_width if travels != self.grad_width else 0
        # the partitions are cast back while the flat copy that they are views of is alive
        flat, back = flush.copied * travels, flush.parts * returns
        if not self.job.zero.reduce_scatter and not outside:  # __avg_scatter_contiguous_grads works in the bucket
            flat, back = 0, flush.numel * returns
        copies = {labels.REDUCTION: cast + flat + back}
        stretch.see("gradient reduction", self.resident, alive, waiting, copies)
        if self.job.offload_optimizer:
            away = self._sent_away(shard(flush.largest, self.job.degree), normed)
            stretch.see("partitions sent away", self.resident, alive, waiting, {labels.REDUCTION: back or flat}, away)

    def _sent_away(self, share: int, at_boundary: bool) -> Parts:
        """A gradient's part of ``share`` elements, which has gone to the host, on the device once more; at the boundary
        its norm is taken (``_offload_grad_partition_at_boundary``)."""
        norm = {labels.NORM: 8 * min(share, NORM_CHUNK) if at_boundary else 0}
        return merged(self._brought(share * self.grad_width), norm)

    def step(self, micro: Micro) -> None:
        stretch = self.open(micro.phase("optimizer_step"), Phase.OPTIMIZER_STEP, micro.step)
        if not micro.boundary:
            stretch.close(self.resident, self.outputs)
            return
        viewed = {labels.VIEWED: self.profiles.viewed_in_steps[0 if micro.step == 1 else 1]}
        kept = merged(self.outputs.without(labels.GATHERED, labels.GATHER_BUFFER), viewed)
        stretch.see("start", self.resident, self.outputs)
        whole = self.profiles.whole_between_steps
        if self.job.hpz and micro.step > 1:  # those of small tensors are made as the step lets go of the whole ones
            kept = merged(kept, {labels.SECONDARY: self._second(whole.sums[0][0])})
        base = merged(self.resident, kept)
        if self.job.offload_optimizer:
            if not self.job.managed:  # _finalize_offload_gradient_accumulation
                self._see_finalised(stretch)
            self._see_update(stretch, kept, micro)
            if self.job.offload_param:
                self._see_small_gathered(stretch, kept, whole)
            self._end_step(stretch, kept, whole)
            return
        base = self._finish(stretch, base)
        stretch.see("gradient norm", base, {labels.NORM: 8 * self.largest_share})
        if self.steps_skipped:
            stretch.close(base)
            return
        for index in self._highest_groups(states_come=micro.step == 1):
            made = (self._states(index), self._states(index + 1)) if micro.step == 1 else ({}, {})
            self._see_group(stretch, base, index, *made)
        if micro.step == 1:
            self.resident = merged(self.resident, self._states(len(self.sub_groups)))
        if self.job.offload_param:
            self._see_small_gathered(stretch, kept, whole)
        self._end_step(stretch, kept, whole)

    def _highest_groups(self, states_come: bool = True) -> Iterator[int]:
        """Sub-groups whose update can be the step's highest instant, of those of one parameter and of the others: in
        the first step states come to be group by group, so none after one of them is as large."""
        most = [0, 0]
        indices = reversed(range(len(self.sub_groups)))
        for index in indices if states_come else sorted(indices, key=self.sub_groups.__getitem__, reverse=True):
            if self.sub_groups[index] > most[self.lone[index]]:
                most[self.lone[index]] = self.sub_groups[index]
                yield index

    def _finish(self, stretch: Stretch, base: Bytes) -> Bytes:
        """What is made of the rank's gradients before their norm, beside ``base``: nothing; what is alive then."""
        return base

    def _states(self, count: int) -> Parts:
        """What the first sub-groups' first steps make."""
        return self.moments(self.optimizer, *self.sub_groups[:count]) if count else {}

    def _see_group(self, stretch: Stretch, base: Bytes, index: int, made: Parts, after: Parts) -> None:
        """One sub-group's step. ``made``, ``after``: states that have come to be before it, and with it."""
        numel, copied = self.sub_groups[index], not self.lone[index]
        cast = self.grad_width != self.master_bytes
        flat = {labels.FLAT_GRAD: numel * self.master_bytes if cast or copied else 0}
        joined = {labels.REDUCTION: numel * self.grad_width if cast and copied else 0}
        stretch.see("gradients flattened", base, made, flat, joined)
        stretch.see("optimizer update", base, after, flat, {labels.STEP_SCRATCH: numel * self.optimizer.scratch})
        if self.job.offload_param:
            stretch.see("weights sent to the host", base, after, flat, self._brought(numel * self.trained_width))

    def _see_small_gathered(self, stretch: Stretch, kept: Bytes, whole: Bytes) -> None:
        # on one rank what is copied from the host is the whole (``NoGatherCoalescedHandle``)
        part = shard(whole.get(labels.GATHERED, ZERO)[0], self.job.degree) if self.job.degree > 1 else 0
        stretch.see("small tensors gathered", self.resident, kept, whole, self._brought(part))

    def _see_finalised(self, stretch: Stretch) -> None:
        stretch.see("gradient norm", self.resident, self.outputs, self._sent_away(self.largest_share, True))

    def _see_update(self, stretch: Stretch, kept: Bytes, micro: Micro) -> None:
        """The optimizer's step in the host's memory."""
        if self.steps_skipped:
            return
        for index in self._highest_groups() if micro.step == 1 else ():
            states = {labels.HOST_MOMENTS: self.optimizer.state_bytes(*self.sub_groups[: index + 1])}
            scratch = {labels.HOST_SCRATCH: self.sub_groups[index] * self.optimizer.scratch}
            stretch.see("optimizer update", self.resident, kept, states, scratch)
        if micro.step == 1:
            states = {labels.HOST_MOMENTS: self.optimizer.state_bytes(*self.sub_groups)}
            self.resident = merged(self.resident, states)
        else:
            scratch = {labels.HOST_SCRATCH: self.sub_group * self.optimizer.scratch}
            stretch.see("optimizer update", self.resident, kept, scratch)

    def _end_step(self, stretch: Stretch, kept: Bytes, whole: Bytes) -> None:
        """Small tensors are whole again, and trained weights have no second parts until they are next released."""
        frozen = {labels.SECONDARY: self.frozen_second} if self.job.hpz else {}
        self.resident = merged(self.resident.without(labels.SECONDARY), frozen)
        stretch.close(self.resident, kept.without(labels.SECONDARY), whole)
