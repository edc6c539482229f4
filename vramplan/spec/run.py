"""RunSpec: everything that a user asks of a run. What is left None is searched by the planner."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from vramplan.spec.base import UserModel
from vramplan.spec.data import DataSpec
from vramplan.spec.layout import Layout
from vramplan.spec.retain import RetainSpec
from vramplan.spec.trainable import FullMethod, Method
from vramplan.spec.training import TrainingSpec

Precision = Literal["bf16", "fp16", "fp32", "bf16-autocast", "bf16-weights-autocast"]
Engine = Literal["deepspeed", "torch"]
Attention = Literal["sdpa", "eager", "flash_attention_2"]
Checkpointing = Literal["none", "full"]
Offload = Literal["none", "cpu", "nvme"]
Loss = Literal["hf", "chunked", "liger"]
Optimizer = Literal[
    "adamw",
    "adamw_torch",
    "adamw_torch_fused",
    "adamw_8bit",
    "paged_adamw",
    "paged_adamw_8bit",
    "lion",
    "sgd",
    "adafactor",
    "muon",
]


class ZeroSpec(UserModel):
    """DeepSpeed's ``zero_optimization`` section; its defaults are those of deepspeed/runtime/zero/config.py.

    Sizes are in elements, not bytes, as in DeepSpeed.
    """

    stage: Literal[0, 1, 2, 3] | None = None
    """0 replicates everything; 1 partitions optimizer states, 2 gradients too, 3 weights too. None: searched."""
    reduce_bucket_size: int = Field(default=500_000_000, ge=1)
    """Elements of the buffer that collects gradients for one reduction."""
    allgather_bucket_size: int = Field(default=500_000_000, ge=0)
    """Elements gathered at once after the optimizer step (unused by torch >= 1.13's in-place gather)."""
    contiguous_gradients: bool = True
    """Copy gradients into one buffer as they appear."""
    overlap_comm: bool | None = None
    """Reduce while backward goes on (two buckets). None: DeepSpeed's default, true only for stage 3."""
    reduce_scatter: bool = True
    """Reduce-scatter gradients instead of all-reducing them."""
    round_robin_gradients: bool = False
    """Lay tensors out so that consecutive gradients belong to different ranks (stages 1 and 2)."""
    use_multi_rank_bucket_allreduce: bool = True
    """Reduce the parts of a bucket that belong to several ranks together (stages 1 and 2)."""
    parameter_alignment: bool = False
    """Begin each tensor at a multiple of 16 bytes of the flat weights (stages 1 and 2)."""
    allgather_partitions: bool = True
    """Gather whole weights after a step by all-gather (DeepSpeed 0.19.8 always does)."""
    ignore_unused_parameters: bool = True
    """Go on where a trained tensor has no gradient."""
    elastic_checkpoint: bool = False
    """Older checkpoints that other numbers of ranks can read."""
    load_from_fp32_weights: bool = True
    """Whether a checkpoint's master weights are read, not its low-precision ones."""
    stage3_prefetch_bucket_size: int = Field(default=50_000_000, ge=0)
    """Elements of weights gathered ahead of use."""
    stage3_param_persistence_threshold: int = Field(default=100_000, ge=0)
    """A weight tensor of at most this many elements stays whole on every rank."""
    stage3_model_persistence_threshold: int = Field(default=2**63 - 1, ge=0)
    """At most this many elements stay whole on every rank altogether."""
    stage3_max_live_parameters: int = Field(default=1_000_000_000, ge=0)
    """Gathered elements kept on a rank before a release."""
    stage3_max_reuse_distance: int = Field(default=1_000_000_000, ge=0)
    """A weight needed again within this many elements is not released."""
    stage3_gather_16bit_weights_on_model_save: bool = False
    """Gather whole weights to save them as one file."""
    stage3_allgather_sequential: bool = False
    """Gather each tensor by itself, without a common buffer."""
    stage3_use_all_reduce_for_fetch_params: bool = False
    """Gather whole weights by an all-reduce over zeros."""
    stage3_module_granularity_threshold: int = Field(default=0, ge=0)
    """Modules with fewer parameters a submodule are gathered as one. 0: none but some families' experts."""
    override_module_apply: bool = True
    """Whether ``Module.apply`` gathers weights under stage 3."""
    log_trace_cache_warnings: bool = False
    """Log when the order of modules changes under stage 3."""
    enable_sanity_checks: bool = False
    """Check among ranks that they gather and reduce the same tensors under stage 3."""
    pipeline_loading_checkpoint: bool = False
    """Read checkpoints a rank at a time under stage 3."""
    memory_efficient_linear: bool = True
    """Whether linears are DeepSpeed's own under stage 3, which save no whole weights."""
    sub_group_size: int = Field(default=1_000_000_000, ge=0)
    """Elements that stage 3's optimizer steps at once."""
    hpz_partition_size: int = Field(default=1, ge=1)
    """Ranks, those of a node, that keep whole weights among them besides every rank's own part, so that backward
    gathers within the node (ZeRO++'s hpZ, stage 3 only). 1: none do."""
    offload_optimizer: Offload | None = None
    """Where optimizer states live; nvme: in files under ``nvme_path`` (stage 3 only). None: searched."""
    offload_param: Offload | None = None
    """Where weights live between uses (stage 3 only). None: searched."""
    nvme_path: str | None = None
    """Directory on the disk that offload to nvme writes to."""


def engine_refuses(engine: Engine, precision: Precision, zero: ZeroSpec, layout: Layout | None) -> str:
    """Why an engine cannot run these together; empty where it can."""
    if engine == "deepspeed":
        weights = "precision bf16-weights-autocast needs engine torch: DeepSpeed casts autocast's weights from fp32"
        return weights if precision == "bf16-weights-autocast" else ""
    if precision == "fp16":
        return (
            "engine torch has no precision fp16: torch's GradScaler refuses fp16 gradients; use bf16 or bf16-autocast"
        )
    if zero.stage:
        return f"engine torch partitions nothing, but zero.stage is {zero.stage}: leave it out, or use engine deepspeed"
    if {"cpu", "nvme"} & {zero.offload_optimizer, zero.offload_param}:
        return "engine torch offloads nothing: leave zero.offload_* out, or use engine deepspeed"
    if layout is not None and max(layout.tp, layout.sp, layout.pp, layout.ep) > 1:
        return "engine torch is data parallel only: set every degree of layout but dp to 1, or use engine deepspeed"
    return ""


_Decay = Annotated[float, Field(ge=0, lt=1)]


class OptimizerSpec(UserModel):
    """The optimizer and its numbers."""

    kind: Optimizer = "adamw"
    """``adamw`` is DeepSpeed's FusedAdam (its CPUAdam where states are offloaded), ``lion`` its FusedLion; paged ones
    are bitsandbytes', whose large states lie in memory that the driver moves to the host when room is short; ``muon``
    is DeepSpeed's, with FusedAdam for what is no matrix and for embeddings and heads."""
    lr: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Peak learning rate. None: by method, 1e-5 full, 2e-4 adapters."""
    betas: tuple[_Decay, _Decay] = (0.9, 0.999)
    """Decay rates of the two moments."""
    eps: float = Field(default=1e-8, ge=0, allow_inf_nan=False)
    """Added to the root of the second moment."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Decoupled weight decay."""
    momentum: float = Field(default=0.0, ge=0, lt=1)
    """Of sgd: share of the last update that goes on; 0 keeps no state. Of muon: 0 takes DeepSpeed's, 0.95."""

    @property
    def state_can_be_cut_anew(self) -> bool:
        """Whether what it keeps is fp32, element by element, so that any ZeRO stage and number of ranks can take it
        over to the bit (``train/fragments.py``). 8-bit states share a scale among 256 neighbours of a rank's stretch:
        cut elsewhere they would be rounded once more, and the training would not be the same, so a run that has them
        keeps its ZeRO stage and its ranks. The paged ones are not trained."""
        return self.kind in ("adamw", "adamw_torch", "adamw_torch_fused", "lion", "sgd")

    @property
    def is_elementwise(self) -> bool:
        """Whether its arithmetic is the same however ZeRO cuts the weights. Adafactor's is not: it sums over rows,
        columns and the whole of each tensor that it is given (torch/optim/_adafactor.py), which under ZeRO is a flat
        share of many. Muon's is of whole matrices, in the format that gradients have under a stage."""
        return self.kind not in ("adafactor", "muon")


class HardwareSpec(UserModel):
    """What the run may use. Nothing given: this machine."""

    gpu: str | None = None
    """A catalogue name (matched loosely), or ``cpu``. None: the GPUs of this machine, else its CPU."""
    gpus_per_node: int | None = Field(default=None, ge=1)
    """Ranks on each node. None: all GPUs of this machine; 2 on the CPU."""
    nodes: int = Field(default=1, ge=1)
    """Number of equal nodes."""
    memory_cap: str | int | None = None
    """Bytes that one rank may use, if less than the device offers, e.g. ``24GiB``."""
    host_memory: str | int | None = None
    """Memory of one node's host. None: this machine's, or a catalogue node's."""
    overhead: str | None = None
    """A file of what the driver and the allocator hold beyond tensors, in the form of facts/data/overhead.json. None:
    the shipped figures."""


class RunSpec(UserModel):
    """One fine-tuning run: the model, what is trained, how, on what data and hardware."""

    model: str
    """A catalogue name, a hub id, or a local directory with a ``config.json``."""
    model_config_fields: dict[str, Any] | None = None
    """The model's ``config.json`` given in place. It replaces as a whole the one that the name stands for: every field
    that is read of it must be here."""
    method: Method = FullMethod()
    """full, lora (or dora, lora with use_dora) or qlora."""
    engine: Engine = "deepspeed"
    """deepspeed; or torch: plain PyTorch on one device or under DDP, as transformers' Trainer and TRL run without
    DeepSpeed (estimated, simulated and measured; training is DeepSpeed's)."""
    precision: Precision = "bf16"
    """Format of weights and compute: bf16 or fp16 (DeepSpeed's engines; with engine torch bf16 weights and states),
    fp32, or bf16 autocast over fp32 weights, or (engine torch) over bf16 ones."""
    grad_accum_dtype: Literal["fp32"] | None = None
    """Format in which ZeRO keeps and adds up gradients (DeepSpeed's ``data_types.grad_accum_dtype``). None: that of the
    weights."""
    bf16_master_weights_and_grads: bool = False
    """Whether ZeRO's master weights, and the gradients that it steps with, are bf16 (DeepSpeed's key in ``bf16``);
    without ``bf16_optimizer_states`` only with offload of the optimizer."""
    bf16_optimizer_states: bool = False
    """Whether the optimizer's moments are bf16 too (DeepSpeed's key in ``bf16``)."""
    seq_len: int = Field(default=2048, ge=1)
    """Tokens of one sequence, padding included."""
    global_batch_size: int | None = Field(default=None, ge=1)
    """Sequences of one optimizer step over all ranks. None: micro-batch x accumulation x ranks."""
    micro_batch_size: int | None = Field(default=None, ge=1)
    """Sequences of one rank's forward. None: searched."""
    grad_accum_steps: int | None = Field(default=None, ge=1)
    """Micro-batches of one optimizer step. None: follows from the global batch."""
    attention: Attention = "sdpa"
    """transformers' attention implementation; where none is named and the family has no sdpa, eager is taken."""
    attention_mask: bool = False
    """Whether a padding mask is passed (batches padded on the right)."""
    activation_checkpointing: Checkpointing | None = None
    """none keeps what backward needs; full keeps each layer's input and recomputes. None: searched."""
    checkpoint_every: int = Field(default=1, ge=1)
    """Of checkpointing full: layers of which one is recomputed, the first of each so many (transformers'
    ``every_n_layers``); the rest keep what their backward needs. 1: every layer is."""
    checkpoint_reentrant: bool = False
    """Whether checkpointing is torch's older, reentrant one (``use_reentrant``): a layer's whole forward is run again
    before any of its backward."""
    loss: Loss = "hf"
    """hf: transformers' own loss over full logits in fp32; chunked: DeepSpeed's (runtime/chunked_cross_entropy.py),
    which leaves them in their own format; liger: fused linear cross-entropy, which never makes them, as DeepSpeed's
    ``TiledFusedLogitsLoss`` does not, which no setting installs."""
    kernels: Literal["hf", "liger"] = "hf"
    """hf: transformers' norms, rotary positions and MLPs; liger: liger-kernel's."""
    tiled_mlp: bool = False
    """MLPs take a stretch of each sequence at a time (DeepSpeed's TiledMLP), as long as the model is wide, and are run
    once more in backward; liger's own MLP is then left out."""
    offload_activations: Offload = "none"
    """Where the layers' inputs that checkpointing keeps lie until backward."""
    shifted_logits: bool = False
    """Whether the loss copies the fp32 logits to shift them, as transformers up to 4.48 did; since then the labels are
    shifted."""
    keep_outputs: bool = False
    """Whether the loop keeps the model's output (the logits) alive through backward and step."""
    optimizer: OptimizerSpec = OptimizerSpec()
    zero: ZeroSpec = ZeroSpec()
    layout: Layout | None = None
    """Degrees of parallelism. None: data parallel over all ranks."""
    alloc_conf: str = ""
    """Value of PYTORCH_CUDA_ALLOC_CONF."""
    hardware: HardwareSpec = HardwareSpec()
    data: DataSpec = DataSpec()
    training: TrainingSpec = TrainingSpec()
    retain: RetainSpec = RetainSpec()

    @model_validator(mode="after")
    def _engine_can(self) -> Self:
        reason = engine_refuses(self.engine, self.precision, self.zero, self.layout)
        hooks = [name for name in ("ewc", "l2sp", "kl") if getattr(self.retain, name) is not None]
        if hooks and self.engine == "torch" and not reason:
            reason = f"retain.{hooks[0]} is a hook of the trainer, which runs DeepSpeed: leave it out of engine torch"
        if reason:
            raise ValueError(reason)
        return self

    @model_validator(mode="after")
    def _formats_go_together(self) -> Self:
        asked = [name for name in ("bf16_master_weights_and_grads", "bf16_optimizer_states") if getattr(self, name)]
        if asked and self.precision != "bf16":
            raise ValueError(f"{asked[0]} needs precision bf16, not {self.precision}")
        if asked == ["bf16_optimizer_states"]:
            raise ValueError("bf16_optimizer_states needs bf16_master_weights_and_grads: set it true")
        if self.engine == "torch" and (asked or self.grad_accum_dtype):
            raise ValueError(f"{(*asked, 'grad_accum_dtype')[0]} is DeepSpeed's: leave it out of engine torch")
        return self

    @property
    def masked(self) -> bool:
        """Whether attention is given a mask of its own: for padding, or so that packed documents do not see each
        other."""
        return self.attention_mask or self.data.packing != "none"

    @property
    def peak_lr(self) -> float:
        """The learning rate after warm-up: as given, else 1e-5 for full training and 2e-4 for adapters."""
        if self.optimizer.lr is not None:
            return self.optimizer.lr
        return 1e-5 if self.method.kind == "full" else 2e-4

    @property
    def not_trained(self) -> str:
        """Why ``vramplan train`` does not run it, though its bytes are counted; empty where it does."""
        formats = ("grad_accum_dtype", "bf16_master_weights_and_grads")
        asked = [name for name in formats if getattr(self, name)]
        if asked:
            return (
                f"{asked[0]}: the trainer's checkpoints hold fp32 master weights and DeepSpeed's own accumulation: "
                "leave it out"
            )
        return self.layout.not_trained if self.layout is not None else ""

    @property
    def new_blocks(self) -> int:
        """Blocks that are added to the model before training."""
        return self.method.new_blocks if isinstance(self.method, FullMethod) else 0
