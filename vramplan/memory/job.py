"""A closed run in the arithmetic's own terms: every format, degree and size that a term needs."""

from __future__ import annotations

from dataclasses import dataclass, replace

from vramplan.facts.architecture import Architecture
from vramplan.facts.dtype import Dtype
from vramplan.memory.blocks.against_forgetting import FISHER
from vramplan.memory.gathers import LEAF_FAMILIES, GatherLimits
from vramplan.memory.granularity import Leaves, leaves
from vramplan.memory.model_run import ModelRun
from vramplan.memory.parameters import (
    ADAPTER_DTYPE,
    Groups,
    Matrices,
    Parameter,
    counted_numels,
    matrix_shapes,
    parameter_groups,
    parameters,
    trained_tensors,
)
from vramplan.memory.quantized import nf4_bytes, packed_numel
from vramplan.memory.size import Size, basis_at
from vramplan.spec.layout import Layout
from vramplan.spec.retain import RetainSpec
from vramplan.spec.run import ZeroSpec
from vramplan.spec.trainable import LoraMethod, Method


@dataclass(frozen=True, slots=True)
class Job:
    """What decides the bytes of one rank."""

    architecture: Architecture
    method: Method
    engine: str
    """``deepspeed`` or ``torch``."""
    dtype: Dtype
    """Format of the weights in the engine."""
    autocast: Dtype | None
    grad_dtype: Dtype
    """Format that ZeRO accumulates gradients in."""
    communicates: Dtype | None
    """Format that ZeRO-3 reduces gradients in, or None: that of accumulation."""
    weights_halved: bool
    """Whether ``zero.Init`` made weights of the asked format first and cast them (``job_from_run``)."""
    master_dtype: Dtype
    """Format of the master weights, and of gradients in the optimizer's step."""
    moment_dtype: Dtype
    """Format of the optimizer's moments."""
    layout: Layout
    split_refused: str
    """What of tensor parallelism is not counted; empty where all is, or there is none."""
    unsplit_numel: int
    """Elements that loading makes beyond the rank's share of a tensor-parallel model."""
    zero: ZeroSpec
    stage: int
    micro_batch_size: int
    seq_len: int
    grad_accum_steps: int
    checkpointing: bool
    checkpoint_every: int
    """Layers of which checkpointing recomputes the first."""
    reentrant: bool
    """Whether checkpointing is torch's reentrant one."""
    attention: str
    optimizer: str
    momentum: float
    device: str
    keep_outputs: bool
    loss: str
    shifted_logits: bool
    chunk_rows: tuple[int, int]
    """Tokens of the chunked loss's blocks, where no polynomial of the batch gives them (``ModelRun.chunk_rows``)."""
    fused_loss_rows: int
    """Tokens of a chunk of the fused loss (liger), which no polynomial of the batch gives; 0: another loss."""
    liger_kernels: bool
    """Whether norms, rotary positions and MLPs are liger-kernel's."""
    tile_rows: int
    """Tokens of a stretch that an MLP takes at a time, which no polynomial of the batch gives; 0: all at once."""
    host_checkpoints: bool
    """Whether the inputs of checkpointed layers lie in the host's memory."""
    kl_chunk_tokens: int
    """Tokens whose probabilities the KL term has at once; 0: there is none."""
    offload_optimizer: bool
    offload_param: bool
    clipping: bool
    masked: bool
    """Whether attention is given a mask of its own (``RunSpec.masked``)."""
    given_positions: bool
    """Whether the batch brings ``position_ids``: packed documents (``data/batch.py``), Ulysses."""
    retain: RetainSpec
    managed: bool
    """Whether DeepSpeed counts micro-batches: stages 0 and 1 then reduce in the last backward, else in the step."""
    adapted_parameters: frozenset[str] = frozenset()
    """Parameters of experts and routers that get adapters as they are (``spec/targets.py``)."""

    @property
    def degree(self) -> int:
        """Ranks that ZeRO partitions over."""
        return self.layout.zero_degree

    @property
    def model_run(self) -> ModelRun:
        return ModelRun(
            architecture=self.architecture,
            method=self.method,
            dtype=self.dtype,
            autocast=self.autocast,
            device=self.device,
            attention=self.attention,
            checkpointing=self.checkpointing,
            checkpoint_every=self.checkpoint_every,
            reentrant=self.reentrant,
            keep_outputs=self.keep_outputs,
            shifted_logits=self.shifted_logits,
            loss=self.loss,
            chunk_rows=self.chunk_rows,
            fused_loss_rows=self.fused_loss_rows,
            liger_kernels=self.liger_kernels,
            tile_rows=self.tile_rows,
            host_checkpoints=self.host_checkpoints,
            sequence_parallel=self.layout.sp,
            lone_sequence=self.lone_sequence,
            adapter_dtype=self.adapter_dtype,
            windowed=any(window <= self.local_len for window in self.architecture.windows),
            masked=self.masked,
            given_positions=self.given_positions,
            kl_chunk_tokens=self.kl_chunk_tokens,
            springs=self.springs,
            spring_ranks=self.degree if self.springs else 1,  # else runs on any number of ranks are the same
            springs_on_host=self.keeps_on_host,
            adapted_parameters=self.adapted_parameters,
            own_linears=self.zero.memory_efficient_linear,
            gathers=self.gather_limits if self.stage == 3 else None,
        )

    @property
    def sums_in_fp32(self) -> bool:
        """Whether ZeRO-1 or 2 adds gradients up in fp32 beside weights of a lower format (``grad_accum_dtype``)."""
        return self.stage < 3 and self.grad_dtype is not self.dtype

    @property
    def springs(self) -> frozenset[str]:
        """Penalties that pull at trained weights."""
        asked = {"l2sp": self.retain.l2sp, "ewc": self.retain.ewc}
        return frozenset(name for name, spec in asked.items() if spec is not None)

    @property
    def sampling_run(self) -> ModelRun | None:
        """The micro-batches of one sequence in which the Fisher diagonal is sampled; None without EWC."""
        if self.retain.ewc is None:
            return None
        return replace(replace(self, micro_batch_size=1, kl_chunk_tokens=0).model_run, springs=frozenset([FISHER]))

    @property
    def fisher_samples(self) -> int:
        """Backwards of a rank in which the Fisher diagonal is sampled, two at most: the third is as the second."""
        return 0 if self.retain.ewc is None else min(2, -(-self.retain.ewc.samples // self.degree))

    @property
    def keeps_on_host(self) -> bool:
        """Whether what methods against forgetting keep lies in the host's memory, beside offloaded weights."""
        return self.offload_param and self.device != "cpu"

    @property
    def adapter_dtype(self) -> Dtype | None:
        """ZeRO-3 of a model built in ``zero.Init`` and plain PyTorch leave adapters as PEFT made them, in fp32; else
        DeepSpeed casts them with the module (runtime/engine.py, ``_configure_distributed_model``). None: the format of
        the weights."""
        keeps = (
            ((self.stage == 3 and not self.quantized) or self.engine == "torch")
            and isinstance(self.method, LoraMethod)
            and self.dtype is not ADAPTER_DTYPE
        )
        return ADAPTER_DTYPE if keeps else None

    @property
    def lone_sequence(self) -> bool:
        """Whether a micro-batch is one sequence, where that decides what is copied: in products of heads that are not
        left to one kernel."""
        in_fp32 = self.dtype is Dtype.FP32 and self.autocast is None  # there torch leaves grouped heads to its own path
        unfused = self.attention == "eager" or self.device == "cpu" or self.layout.sp > 1 or in_fp32
        return self.micro_batch_size == 1 and (unfused or self.architecture.has_own_core)

    @property
    def shapeless(self) -> Job:
        """The job of every batch that makes the same instants: what of micro-batch and sequence decides more than
        sizes is whether there is one sequence, and which sliding windows are shorter than it."""
        reached = max((window for window in self.architecture.windows if window <= self.local_len), default=0)
        return replace(self, micro_batch_size=1 if self.lone_sequence else 2, seq_len=reached * self.layout.sp)

    @property
    def local_len(self) -> int:
        """Tokens of a sequence that a rank has, by which masks are made: Ulysses has attention see all without one
        (ulysses_sp.py, ``uattn_wrapper``)."""
        return self.seq_len // self.layout.sp

    @property
    def basis(self) -> Size:
        """The values of the size polynomials at this batch, of one rank's tokens."""
        return basis_at(self.micro_batch_size, self.seq_len // self.layout.sp)

    @property
    def quantized(self) -> bool:
        """Whether the frozen projections are kept in 4 bits."""
        return isinstance(self.method, LoraMethod) and self.method.kind == "qlora"

    def is_quantized(self, param: Parameter) -> bool:
        """A weight of a projection that bitsandbytes keeps in 4 bits."""
        return self.quantized and param.packable

    def bytes_of(self, param: Parameter) -> int:
        """What a frozen parameter takes."""
        if isinstance(self.method, LoraMethod) and self.method.fp32_norms and "norm" in param.name:
            return param.numel * Dtype.FP32.nbytes
        return nf4_bytes(param.numel) if self.is_quantized(param) else param.numel * self.dtype.nbytes

    def cut_numel(self, param: Parameter) -> int:
        """Elements of the tensor that ZeRO-3 cuts: of a weight in 4 bits, those as which it is packed."""
        return packed_numel(param.numel, self.dtype.nbytes) if self.is_quantized(param) else param.numel

    @property
    def hpz(self) -> int:
        """Ranks that keep whole weights among them in second parts; 0: none do."""
        return self.zero.hpz_partition_size if self.stage == 3 and self.zero.hpz_partition_size > 1 else 0

    @property
    def leaves(self) -> Leaves:
        """What ``stage3_module_granularity_threshold`` has ZeRO-3 gather whole; "other" what is not counted: adapters,
        layers with mixtures that are taken whole themselves."""
        threshold = self.zero.stage3_module_granularity_threshold
        if self.stage < 3 or not threshold:
            return "none"
        if self.method.kind != "full":
            return "other"
        found = leaves(self.architecture, threshold)
        return "other" if found == "layers" and self.architecture.family in LEAF_FAMILIES else found

    @property
    def gather_limits(self) -> GatherLimits:
        zero = self.zero
        from_host = self.offload_param and self.device != "cpu"
        return GatherLimits(
            # one by one nothing is gathered ahead (runtime/engine.py, _configure_zero_optimizer)
            prefetch_bucket_numel=1 if zero.stage3_allgather_sequential else zero.stage3_prefetch_bucket_size,
            one_by_one=zero.stage3_allgather_sequential,
            by_all_reduce=zero.stage3_use_all_reduce_for_fetch_params,
            max_live_numel=zero.stage3_max_live_parameters,
            max_reuse_numel=zero.stage3_max_reuse_distance,
            persistence_numel=zero.stage3_param_persistence_threshold,
            model_persistence_numel=zero.stage3_model_persistence_threshold,
            alone=self.degree == 1,
            copied=self.degree > 1 or from_host,
            degree=self.degree if self.degree > 1 and (from_host or self.autocast is not None) else 0,
            secondary=self.hpz,
            ranks=self.degree if self.hpz else 0,
            from_host=from_host,
            leaf_layers=self.leaves == "layers",
        )

    @property
    def groups(self) -> Groups:
        """The optimizer's groups of trained parameters: one, or one for each rate, the highest first
        (``retain/layer_lr.py``)."""
        return parameter_groups(*self.grouping)

    @property
    def grouping(self) -> tuple[Architecture, Method, frozenset[str], float, Matrices]:
        """What decides the groups. Weights that ``zero.Init`` has cut are all of one shape as the optimizer is made."""
        matrices: Matrices = "together"
        if self.optimizer == "muon":
            matrices = "apart" if self.stage == 3 and self.method.kind == "full" else "largest first"
        return self.architecture, self.method, self.adapted_parameters, self.retain.layer_lr_decay, matrices

    @property
    def matrices(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the parameters that Muon updates, by name."""
        return matrix_shapes(self.architecture, self.method, self.adapted_parameters)

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        return parameters(self.architecture, self.method, self.adapted_parameters)

    @property
    def trained(self) -> tuple[tuple[str, int], ...]:
        """Name and elements of every parameter that is trained."""
        return trained_tensors(self.architecture, self.method, self.adapted_parameters)

    def numels(self, trained: bool) -> tuple[tuple[int, int], ...]:
        """Elements of a parameter that is trained, or that is not, and how many parameters have as many."""
        return counted_numels(self.architecture, self.method, self.adapted_parameters, trained)
