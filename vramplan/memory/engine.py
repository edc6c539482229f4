"""What every ZeRO stage has in common: the run's phases, and the activations that pass through them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

from vramplan.memory import labels
from vramplan.memory.activations import forward_candidates
from vramplan.memory.between import Files, Standing, Written
from vramplan.memory.cut import merged_experts
from vramplan.memory.job import Job
from vramplan.memory.model_run import ModelRun
from vramplan.memory.moments import Bytes, Parts, Stretch, at_point, joined, merged
from vramplan.memory.muon import MuonSteps
from vramplan.memory.optimizers import OptimizerBytes, optimizer_bytes
from vramplan.memory.parameters import ADAPTER_DTYPE, Parameter
from vramplan.memory.profile import Profile, profile
from vramplan.memory.quantized import BLOCK, nf4_bytes, quantizing_bytes
from vramplan.memory.retention import kept_bytes, reference_bytes
from vramplan.memory.term import Phase
from vramplan.memory.torch_optimizers import Steps
from vramplan.spec.trainable import LoraMethod

MICROS_SHOWN = 3
"""Micro-batches of a step that are told apart: the first, one between, and the last."""


@dataclass(frozen=True, slots=True)
class Micro:
    """Which micro-batch of which step: states come and go with the first step, the first and the last micro-batch."""

    step: int
    index: int
    count: int
    follows: bool = False
    """Whether gradients of others are there already where it is the first."""

    @property
    def first(self) -> bool:
        return self.index == 1 and not self.follows

    @property
    def boundary(self) -> bool:
        return self.index == self.count

    def phase(self, name: str) -> str:
        return f"step{self.step}.micro{self.index}.{name}"


class Engine(ABC):
    """Walks one run's phases and collects their instants; one subclass a ZeRO stage.

    ``resident`` is what is alive between phases besides activations; subclasses change it as the engine does.
    """

    def __init__(self, job: Job, rank: int) -> None:
        self.job = job
        self.rank = rank
        self.width = job.dtype.nbytes
        self.resident = Bytes()
        self.stretches: list[Stretch] = []
        self.outputs = Bytes()
        self.started = Bytes()
        """What is resident when the engine is made."""
        self.kept, self.reference = kept_bytes(job), reference_bytes(job)
        self.pulls = False
        """Whether springs pull in the backward of the micro-batch in hand."""
        self.adds = False
        """Whether its gradients are added to those of earlier ones."""
        self.sampling = False
        """Whether it is a sample for the Fisher diagonal."""
        self.sums_left = job.stage == 2 and job.retain.ewc is not None
        """Whether sampling leaves sums to which the first step's gradients are added."""
        self.steps_skipped = False
        """Whether every optimizer step is discarded as an overflow, so that states never come to be."""
        params = job.parameters
        self.trained = job.trained
        self.trained_numel = sum(numel for _, numel in self.trained)
        self.frozen_bytes = sum(job.bytes_of(param) for param in params if not param.trained)
        self.adapter_numel = sum(param.numel for param in params if param.adapter)
        self.lowered = self._lowered()

    def _lowered(self) -> frozenset[str]:
        """Parameters that travel in autocast's format, where it is not that of the weights: those of ``nn.Linear``
        (runtime/torch_autocast.py, ``init_autocast_params``)."""
        if self.job.autocast in (None, self.job.dtype):
            return frozenset()
        return frozenset(param.name for param in self.job.parameters if param.trained and param.in_linear)

    def walk(self) -> list[Stretch]:
        self.load()
        self.init()
        self.started = self.resident
        if self.job.retain.ewc is not None:
            self.sample()
        count = self.job.grad_accum_steps
        shown = sorted({1, min(2, count), count}) if count > MICROS_SHOWN else range(1, count + 1)
        for step in (1, 2):
            for index in shown:
                micro = Micro(step, index, count, follows=step == 1 and self.sums_left)
                self.pulls, self.adds = micro.boundary, self.job.stage < 2 and not micro.first
                self.forward(micro)
                self.backward(micro)
                self.step(micro)
        return self.stretches

    def sample(self) -> None:
        """The Fisher diagonal is sampled (``train/retention.py``, ``start_penalties``): backwards that no step follows,
        after the first of which all are as the second; then gradients are let go of."""
        before = len(self.stretches)
        self.sampling = True
        for index in range(1, 1 + self.job.fisher_samples):
            micro = Micro(1, index, 3)
            self.adds = self.job.stage < 2 and not micro.first
            self.forward(micro)
            self.backward(micro)
        self.sampling = False
        found = joined("retention", self.stretches[before:], self.kept)
        self.resident, self.outputs = self.resident.without(labels.GRADIENTS), Bytes()
        found.close(self.resident)
        self.stretches[before:] = [found]

    def standing(self) -> Standing:
        """What stays from phase to phase, after ``walk``."""
        return Standing(
            started=self.started,
            between=self.resident,
            gathered=self.gathered(),
            kept=self.kept,
            files=self.files(),
            states=self.states(),
            written=self.written(),
        )

    def gathered(self) -> Parts:
        """Small tensors that are whole after a step."""
        return {}

    def files(self) -> Files:
        """What a checkpoint's files hold."""
        return Files()

    def states(self) -> Parts:
        """The optimizer's states as they are after a step."""
        names = (labels.MOMENTS, labels.HOST_MOMENTS, labels.HOST_PAGED)
        return Bytes({name: self.resident[name] for name in names if name in self.resident})

    def written(self) -> Written:
        """What is copied to be exported: what is trained of a model with adapters, else all (``train/export.py``)."""
        trained = [param.numel * self._width_of(param) for param in self.job.parameters if param.trained]
        copied = sum(trained) + (0 if isinstance(self.job.method, LoraMethod) else self.frozen_bytes)
        return Written(copied, 0, (copied, 0))

    def _width_of(self, param: Parameter) -> int:
        kept = self.job.adapter_dtype if param.adapter else None
        return (kept or self.job.dtype).nbytes

    def open(self, record_phase: str, phase: Phase, step: int = 1) -> Stretch:
        loading = phase in (Phase.MODEL_LOAD, Phase.ENGINE_INIT)
        held = self.reference if phase is Phase.ENGINE_INIT else {} if loading else self.kept
        stretch = Stretch(
            record_phase,
            phase,
            step == 1,
            host_apart=self.job.device != "cpu",
            held=held,
        )
        self.stretches.append(stretch)
        return stretch

    def load(self) -> None:
        """The model is built in the run's dtype; without a checkpoint to read, a tied head is made before it is tied
        (``post_init``)."""
        base = (self.trained_numel - self.adapter_numel) * self.width + self.frozen_bytes
        base += self.job.unsplit_numel * self.width
        adapters = self.adapter_numel * max(self.width, ADAPTER_DTYPE.nbytes)
        architecture = self.job.architecture
        twice = 0
        if architecture.tied_embeddings and self.job.keep_outputs:  # a measured run builds from the config alone
            twice = architecture.head.weight_numel * self.width
        stretch = self.open("model_load", Phase.MODEL_LOAD)
        frozen = self.frozen_bytes
        built = {labels.FROZEN: frozen, labels.WEIGHTS: base + adapters - frozen}
        self.resident = merged(built)
        if self.job.device != "cpu" and not self.job.quantized:  # built on the host; the engine moves it
            mapped = architecture.stored_dtype is self.job.dtype
            experts, joining = merged_experts(self.job)
            stretch.see("built", {labels.HOST_BUILT: (experts if mapped else base) + max(joining, adapters)})
            stretch.close()
            return
        packed = [param for param in self.job.parameters if self.job.is_quantized(param)] if self.job.quantized else []
        whole = base + sum(param.numel * self.width - nf4_bytes(param.numel) for param in packed)
        built_whole = self.job.device == "cpu" and self.job.keep_outputs  # before the first weight is packed
        if packed:
            self._see_packing(stretch, packed, whole if built_whole else base)
        tied = {labels.WEIGHTS: whole if built_whole else base, labels.LOADING: twice}
        stretch.see("a tied head before it is tied", tied)
        self._see_dora(stretch, base)
        stretch.close(built)

    def _see_packing(self, stretch: Stretch, packed: list[Parameter], built: int) -> None:
        """Each weight is there in its own format before it is packed: read one after the other beside the packed ones,
        or, in a measured run on the CPU, built with all others before the first is packed. On a GPU the scales are made
        in fp32; the CPU's kernel is in Python, and holds more."""
        if self.job.device != "cpu":
            largest = max(param.numel for param in packed)
            reading = {labels.LOADING: largest * self.width + 2 * 4 * (largest // BLOCK)}
            stretch.see("the largest weight before it is quantized", {labels.WEIGHTS: built}, reading)
            return
        for param in packed:
            whole, scratch = param.numel * self.width, quantizing_bytes(param.numel, self.width)
            reading = {labels.LOADING: scratch + (0 if self.job.keep_outputs else whole)}
            stretch.see("a weight that is quantized", {labels.WEIGHTS: built}, reading)
            built -= whole - nf4_bytes(param.numel) if self.job.keep_outputs else 0

    def see_split(self, stretch: Stretch) -> None:
        """Tensor parallelism: each weight gives way to a copy of the rank's share, in the order of the model (AutoTP's
        ``uneven_partition``); on a GPU only the shares are there."""
        job, degree = self.job, self.job.layout.tp
        if degree == 1 or job.device != "cpu":
            return
        alive = highest = job.architecture.num_params + job.unsplit_numel
        for _, linear in job.architecture.named_linears():
            if linear.by_matmul:
                highest = max(highest, alive + linear.weight_numel)
                alive -= (degree - 1) * linear.weight_numel
        stretch.see("weights split among ranks", {labels.WEIGHTS: highest * self.width})

    def _see_dora(self, stretch: Stretch, base: int, tensors: int = 3) -> None:
        """Each magnitude starts as a norm of ``weight + scaling * B @ A`` (peft/tuners/lora/dora.py, ``update_layer``):
        the product, its scaled copy and the sum, in the weight's format; ``tensors`` of its size in all."""
        if not isinstance(self.job.method, LoraMethod) or not self.job.method.use_dora:
            return
        tied = next(param for param in self.job.parameters if not param.adapter)  # the token table, of a tied head
        weights, made = {param.name: param for param in self.job.parameters if not param.adapter}, base
        for param in self.job.parameters:
            if not param.adapter:
                continue
            if param.name.endswith("lora_magnitude_vector.weight"):
                module = param.name.removesuffix(".lora_magnitude_vector.weight")
                weight = weights.get(f"{module}.weight", tied)
                loading = tensors * weight.numel * self.width
                if self.job.is_quantized(weight):  # the layer is copied, and the copy's weight written out
                    loading = nf4_bytes(weight.numel) + 4 * weight.numel * self.width
                stretch.see("a magnitude's first norm", {labels.WEIGHTS: made, labels.LOADING: loading})
            made += param.numel * self.width  # cast to fp32 when all are made

    @abstractmethod
    def init(self) -> None:
        """``deepspeed.initialize``."""

    @abstractmethod
    def backward(self, micro: Micro) -> None: ...

    @abstractmethod
    def step(self, micro: Micro) -> None: ...

    def forward(self, micro: Micro) -> None:
        stretch = self.open(micro.phase("forward"), Phase.FORWARD, micro.step)
        self.outputs = Bytes()
        for _, point in forward_candidates(self.model_run):
            stretch.see(point.where, self.resident, at_point(point))
        self.end_forward(stretch, self.profile)

    def end_forward(self, stretch: Stretch, found: Profile) -> None:
        """The instants after the loss."""
        stretch.close(merged(self.resident, at_point(found.forward_end)))

    @staticmethod
    def moments(optimizer: OptimizerBytes | Steps | MuonSteps, *tensors: int) -> Parts:
        """The states of tensors of these numbers of elements, or of the parameters that ``Steps`` knows."""
        if not isinstance(optimizer, OptimizerBytes):
            return {labels.MOMENTS: optimizer.state_bytes, labels.HOST_PAGED: optimizer.paged_bytes}
        device, paged = optimizer.state_bytes(*tensors), optimizer.paged_bytes(*tensors)
        return {labels.MOMENTS: device, labels.HOST_PAGED: paged}

    def after_backward(self) -> Bytes:
        """What of the micro-batch outlives its backward: tokens, and the outputs where the loop keeps them."""
        return at_point(self.profile.backward_end)

    def pinned_rounding(self, *blocks: int) -> Parts:
        """What pinning adds to blocks of the host's memory; nothing on the CPU, where nothing is pinned."""
        return {labels.HOST_PINNED: max(0, self.pinned(*blocks) - sum(blocks))}

    def pinned(self, *blocks: int) -> int:
        """What blocks of the host's memory take when they are pinned, each by itself; nothing on the CPU."""
        if self.job.device == "cpu":
            return 0
        return sum(1 << (block - 1).bit_length() for block in blocks if block)

    @property
    def model_run(self) -> ModelRun:
        """What decides the bytes of the micro-batch in hand."""
        sampled = self.job.sampling_run if self.sampling else None
        found = sampled or self.job.model_run
        if not found.springs:
            return found
        return (
            replace(found, adds_gradients=self.adds) if sampled or self.pulls else replace(found, springs=frozenset())
        )

    @property
    def profile(self) -> Profile:
        """The micro-batch where weights stay whole."""
        return profile(self.model_run)

    def optimizer_on(self, device: str) -> OptimizerBytes:
        """What the optimizer keeps and makes an element, where its states lie on ``device``."""
        found = optimizer_bytes(self.job.optimizer, device, self.job.momentum)
        return found.in_formats(self.job.moment_dtype, self.job.master_dtype)

    @property
    def master_bytes(self) -> int:
        return self.job.master_dtype.nbytes
