"""ZeRO-0: every rank holds everything (deepspeed 0.19.8, runtime/fp16/fused_optimizer.py and unfused_optimizer.py; the
optimizer as it is for fp32)."""

from __future__ import annotations

from vramplan.facts.dtype import Dtype
from vramplan.memory import labels
from vramplan.memory.activations import backward_candidates
from vramplan.memory.between import Files
from vramplan.memory.engine import Engine, Micro
from vramplan.memory.job import Job
from vramplan.memory.moments import Stretch, at_point, merged
from vramplan.memory.muon import MuonSteps
from vramplan.memory.optimizers import optimizer_bytes
from vramplan.memory.size import ZERO
from vramplan.memory.term import Phase
from vramplan.memory.torch_optimizers import Steps, handed_to_deepspeed

REDUCE_NUMEL = 500_000_000
"""``MEMORY_OPT_ALLREDUCE_SIZE`` (runtime/engine.py): elements that one all-reduce flattens."""


class Zero0(Engine):
    """Low precision under FusedAdam: flat weights, a flat fp32 master and states made at once; under any other
    optimizer a master and states for each parameter (``_configure_fp16_optimizer``). fp32: torch's parameters as they
    are."""

    def __init__(self, job: Job, rank: int) -> None:
        super().__init__(job, rank)
        self.low = self.width < self.master_bytes
        self.flat = job.optimizer == "adamw"
        self.optimizer = optimizer_bytes(job.optimizer, job.device, job.momentum)
        self.steps = self._steps()

    def _steps(self) -> Steps | MuonSteps:
        job = self.job
        if job.optimizer == "muon":
            others = sum(numel for name, numel in self.trained if name not in job.matrices)
            ordered = (job.matrices[name] for group in job.groups for name, _ in group if name in job.matrices)
            return MuonSteps(tuple(ordered), others, job.device)
        kind = handed_to_deepspeed(job.optimizer, job.device, job.momentum)
        factored = {param.name: param.factored_numel for param in job.parameters if param.trained}
        groups = tuple(tuple((numel, factored[name]) for name, numel in group) for group in job.groups)
        return Steps(kind, groups, self.master_bytes)

    def init(self) -> None:
        stretch = self.open("engine_init", Phase.ENGINE_INIT)
        self.see_split(stretch)
        frozen = {labels.FROZEN: self.frozen_bytes}
        weights = {labels.WEIGHTS: self.trained_numel * self.width}
        self.resident = merged(frozen, weights)
        if self.low and not self.flat:
            master = {labels.MASTER: self.trained_numel * self.master_bytes}
            zeros = {labels.INIT: self.trained_numel * (self.width + self.master_bytes)}  # of weights and of master
            stretch.see("a first step with zero gradients", self.resident, master, zeros, self._update(1))
            self.resident = merged(self.resident, master, self.moments(self.steps))
        elif self.low:
            self._see_groups(stretch)
            master = {labels.MASTER: self.trained_numel * self.master_bytes}
            states = self.moments(self.optimizer, self.trained_numel)
            trial = {labels.INIT: self.trained_numel * (self.master_bytes + self.optimizer.scratch)}
            stretch.see("a first step with zero gradients", self.resident, master, states, trial)
            self.resident = merged(self.resident, master, states)
        stretch.close(self.resident)

    def _groups(self) -> list[tuple[int, int]]:
        """Elements of the groups before each, and its own."""
        numels = [sum(numel for _, numel in group) for group in self.job.groups]
        return [(sum(numels[:index]), numel) for index, numel in enumerate(numels)]

    def _see_groups(self, stretch: Stretch) -> None:
        """Each group is cloned and flattened, then its master is made."""
        for done, numel in self._groups():
            copies = {labels.INIT: 2 * numel * self.width, labels.MASTER: done * self.master_bytes}
            stretch.see("weights flattened", self.resident, copies)

    def files(self) -> Files:
        """Everything in one file: ``state_dict`` of FP16_Optimizer and FP16_UnfusedOptimizer has the masters."""
        weights = self.trained_numel * self.width
        master = self.trained_numel * self.master_bytes if self.low else 0
        states = self.states().get(labels.MOMENTS, ZERO)
        assert not isinstance(states, int)
        groups = [numel for _, numel in self._groups()]
        whole = max(groups if self.low and self.flat else [numel for _, numel in self.trained], default=0)
        return Files(shared=weights + master + states[0], largest_shared=whole * self.master_bytes)

    def _update(self, step: int) -> dict[str, int]:
        """States and temporaries at the highest instant of a step of torch's own loop over parameters."""
        states, scratch = self.steps.highest(step == 1)
        paged = {labels.HOST_PAGED: self.steps.paged_bytes}
        return {labels.MOMENTS: states, labels.STEP_SCRATCH: scratch, **paged}

    def backward(self, micro: Micro) -> None:
        stretch = self.open(micro.phase("backward"), Phase.BACKWARD, micro.step)
        for group in backward_candidates(self.model_run, self.width if micro.first else 0):
            for _, point in group:
                kept = {labels.GRADIENTS: self.width * point.grad_numel} if micro.first else {}
                stretch.see(point.where, self.resident, kept, at_point(point))
        self.outputs = self.after_backward()
        if micro.first:
            self.resident = merged(self.resident, {labels.GRADIENTS: self.width * self.trained_numel})
        self.after_gradients(stretch)
        if micro.boundary and self.job.managed:
            self._reduce(stretch)
        stretch.close(self.resident, self.outputs)

    def after_gradients(self, stretch: Stretch) -> None:
        """What is made of a micro-batch's gradients before any reduction: nothing."""

    def _reduce(self, stretch: Stretch) -> None:
        """``buffered_allreduce_fallback``: gradients are flattened, at least ``REDUCE_NUMEL`` elements at a time."""
        numel = most = 0
        for _, each in self.trained:
            numel += each
            if numel > REDUCE_NUMEL:
                most, numel = max(most, numel), 0
        # under sequence parallelism the flat copy is cast to travel (allreduce_bucket)
        cast = Dtype.FP32.nbytes if self.job.layout.sp > 1 and self.width != Dtype.FP32.nbytes else 0
        copy = {labels.REDUCTION: max(most, numel) * (self.width + cast)}
        stretch.see("gradient reduction", self.resident, self.outputs, copy)

    def step(self, micro: Micro) -> None:
        stretch = self.open(micro.phase("optimizer_step"), Phase.OPTIMIZER_STEP, micro.step)
        if not micro.boundary:
            stretch.close(self.resident, self.outputs)
            return
        if not self.job.managed:
            self._reduce(stretch)
        if self.flat:
            self._flat_step(stretch, micro)
        else:
            self._parameters_step(stretch, micro)
        stretch.close(self.resident, self.outputs)

    def _parameters_step(self, stretch: Stretch, micro: Micro) -> None:
        """Every parameter by itself; in low precision each gradient is cast first, and both stay until the end."""
        first = micro.step == 1 and not self.low
        before = self.resident.without(labels.MOMENTS, labels.HOST_PAGED)
        wide = {labels.FLAT_GRAD: self.trained_numel * self.master_bytes} if self.low else {}
        stretch.see("optimizer update", before, self.outputs, wide, self._update(1 if first else 2))
        self.resident = merged(before.without(labels.GRADIENTS), self.moments(self.steps))

    def _flat_step(self, stretch: Stretch, micro: Micro) -> None:
        scratch = {labels.STEP_SCRATCH: self.trained_numel * self.optimizer.scratch}
        if self.low:
            for done, numel in self._groups():  # a group's are cast one by one, then flattened, and let go of
                left = {labels.GRADIENTS: (self.trained_numel - done) * self.width}
                copies = {labels.FLAT_GRAD: (done + 2 * numel) * self.master_bytes}
                kept = self.resident.without(labels.GRADIENTS)
                stretch.see("gradients cast and flattened", kept, self.outputs, left, copies)
            self.resident = self.resident.without(labels.GRADIENTS)
            flat = {labels.FLAT_GRAD: self.trained_numel * self.master_bytes}
            stretch.see("optimizer update", self.resident, self.outputs, flat, scratch)
        else:
            if micro.step == 1:
                states = self.moments(self.optimizer, *(numel for _, numel in self.trained))
                self.resident = merged(self.resident, states)
            stretch.see("optimizer update", self.resident, self.outputs, scratch)
            self.resident = self.resident.without(labels.GRADIENTS)
