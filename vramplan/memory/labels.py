"""Every heading of the ledger: its category, its basis, and the formula with its source."""

from __future__ import annotations

from dataclasses import dataclass

from vramplan.memory.term import Basis, Category, Place, Term


@dataclass(frozen=True, slots=True)
class Label:
    """What a heading of the ledger means."""

    category: Category
    note: str
    basis: Basis = Basis.DERIVED


FROZEN = "frozen weights"
WEIGHTS = "trained weights"
MASTER = "fp32 master weights"
MOMENTS = "optimizer states"
GRADIENTS = "gradients"
GRAD_PARTITION = "gradient partition"
ACCUMULATED = "accumulated gradients"
BUCKET = "reduce bucket"
WIDE_GRADIENTS = "fp32 gradients"
REDUCTION = "reduction copy"
DDP_BUCKETS = "DDP buckets"
INIT = "copies during initialisation"
NORM = "gradient norm in fp64"
FLAT_GRAD = "flat gradient for the step"
STEP_SCRATCH = "optimizer step scratch"
STAGED = "staged momentum"
UPDATES = "orthogonalised gradients"
MUON_GATHERS = "buffers of Muon's gathers"
GATHERED = "gathered weights"
OFFLOAD_BUFFER = "offload staging"
HOST = "host: "
"""What a heading begins with if its bytes lie in the host's memory."""
HOST_WEIGHTS = f"{HOST}weights"
HOST_MASTER = f"{HOST}fp32 master weights"
HOST_MASTER_PAGED = f"{HOST}fp32 master weights, not pinned"
HOST_MOMENTS = f"{HOST}optimizer states"
HOST_PAGED = f"{HOST}paged optimizer states"
HOST_SCRATCH = f"{HOST}temporaries of the optimizer"
HOST_GRAD = f"{HOST}fp32 gradients"
HOST_PARTITION = f"{HOST}gradient partition"
HOST_STAGING = f"{HOST}staging buffers"
HOST_ACCUMULATED = f"{HOST}accumulated gradients"
HOST_PINNED = f"{HOST}rounding of pinned blocks"
HOST_SUMS_PINNED = f"{HOST}rounding of accumulated gradients"
HOST_CACHED = f"{HOST}pinned blocks kept for reuse"
HOST_ANCHORS = f"{HOST}starting weights"
HOST_FISHER = f"{HOST}Fisher diagonal"
HOST_REFERENCE = f"{HOST}frozen copy of the base"
HOST_INIT = f"{HOST}copies during initialisation"
HOST_SWAP = f"{HOST}buffers between memory and files"
HOST_POOL = f"{HOST}buffers of weights in files"
SWAPPED_GRADS = "gradients on their way to files"
DISK_MASTER = "disk: fp32 master weights"
DISK_MOMENTS = "disk: optimizer states"
DISK_GRADS = "disk: gradients"
DISK_WEIGHTS = "disk: weights"
HOST_SNAPSHOT = f"{HOST}snapshots in shared memory"
HOST_ACTIVATIONS = f"{HOST}inputs of layers"
HOST_BUILT = f"{HOST}weights before they move to the device"
HOST_READ = f"{HOST}checkpoint as it was read"
HOST_WRITTEN = f"{HOST}storage on its way to a checkpoint"
HOST_EXPORT = f"{HOST}weights to be exported"
VIEWED = "gathered weights kept by views"
GATHER_BUFFER = "gather buffer"
SECONDARY = "second parts of weights"
ANCHORS = "starting weights"
FISHER = "Fisher diagonal"
REFERENCE = "frozen copy of the base"
KL = "KL to the base"
PULL = "penalty scratch"
PERSISTENT = "persistent weights"
LOADING = "copies during loading"
OUTPUTS = "logits"
SCRATCH = "kernel scratch"
AUTOCAST_COPIES = "autocast copies of weights"

PINNED = frozenset(
    [
        HOST_WEIGHTS,
        HOST_MASTER,
        HOST_GRAD,
        HOST_PARTITION,
        HOST_STAGING,
        HOST_ACCUMULATED,
        HOST_PINNED,
        HOST_SUMS_PINNED,
        HOST_CACHED,
        HOST_SWAP,
        HOST_POOL,
    ]
)
"""Headings of page-locked memory, where the device is not the host (``pin_memory`` of both offloads); the rest of the
host's can be paged."""

LABELS: dict[str, Label] = {
    OFFLOAD_BUFFER: Label(Category.COMMUNICATION, "width x largest trained tensor (temp_grad_buffer_for_gpu_offload)"),
    HOST_WEIGHTS: Label(Category.PARAMETER, "width x elements / ranks, a flat pinned buffer (offload_param)"),
    HOST_MASTER: Label(Category.OPTIMIZER, "4 B x trained elements / ranks", Basis.EXACT),
    HOST_MASTER_PAGED: Label(
        Category.OPTIMIZER, "4 B x trained elements / ranks (stage3.py:1158 clones and does not pin)", Basis.EXACT
    ),
    HOST_MOMENTS: Label(Category.OPTIMIZER, "trained elements / ranks x 8 B with CPUAdam; made in the first step"),
    HOST_PAGED: Label(
        Category.OPTIMIZER,
        "states of tensors of 100,000 elements and more, in memory that the driver moves to the host when room is "
        "short (bitsandbytes); how much of it stays on the GPU nobody measured",
        Basis.ASSUMED,
    ),
    HOST_SCRATCH: Label(Category.TEMPORARY, "what the optimizer's update makes besides, in the host's memory"),
    HOST_GRAD: Label(Category.GRADIENT, "4 B x trained elements / ranks, the master's .grad"),
    HOST_PARTITION: Label(Category.GRADIENT, "width x trained elements / ranks (grad_partitions_flat_buffer)"),
    HOST_STAGING: Label(
        Category.COMMUNICATION,
        "width x trained elements / ranks (param_buffer_of_bit16_for_cpu_offload_groups) + width x largest tensor",
    ),
    HOST_ACCUMULATED: Label(Category.GRADIENT, "width x elements of the rank's own tensors (accumulated_grads_in_cpu)"),
    HOST_PINNED: Label(Category.OVERHEAD, "torch rounds each pinned block up to a power of two (CachingHostAllocator)"),
    HOST_SUMS_PINNED: Label(Category.OVERHEAD, "each is a pinned block by itself, rounded up to a power of two"),
    HOST_CACHED: Label(
        Category.OVERHEAD,
        "the parts in which trained weights were pinned while the model was built: torch keeps pinned blocks that are "
        "let go of (CachingHostAllocator)",
    ),
    HOST_INIT: Label(Category.TEMPORARY, "fp32 gradients of the states before they are pinned, and one buffer more"),
    HOST_ACTIVATIONS: Label(
        Category.ACTIVATION, "layers x tokens x hidden x width: what checkpointing keeps (torch's save_on_cpu)"
    ),
    HOST_SWAP: Label(
        Category.COMMUNICATION,
        "4 (offload_optimizer.buffer_count) x 4 B x elements of the largest sub-group, page-locked (SwapBufferManager)",
    ),
    HOST_POOL: Label(
        Category.COMMUNICATION,
        "5 x 100,000,000 (offload_param.buffer_count, buffer_size) x width, page-locked "
        "(AsyncPartitionedParameterSwapper)",
    ),
    SWAPPED_GRADS: Label(
        Category.GRADIENT,
        "4 B x trained elements / ranks, on the device until the last norm is taken "
        "(_finalize_offload_gradient_accumulation)",
    ),
    DISK_MASTER: Label(Category.OPTIMIZER, "4 B x trained elements / ranks of sub-groups of at least 1 MiB"),
    DISK_MOMENTS: Label(Category.OPTIMIZER, "2 x 4 B x trained elements / ranks of the same"),
    DISK_GRADS: Label(Category.GRADIENT, "4 B x elements of each part of at least 1 MiB, in whole blocks of 1,024 B"),
    DISK_WEIGHTS: Label(
        Category.PARAMETER,
        "width x elements / ranks of parts of at least 1 MiB: written as the model is built, and left there",
    ),
    HOST_SNAPSHOT: Label(
        Category.OPTIMIZER, "2 x one rank's share of a checkpoint: the last one stays until the next is whole"
    ),
    HOST_BUILT: Label(
        Category.PARAMETER,
        "width x elements on every rank (from_pretrained, then module.to), and adapters in fp32; weights that keep the "
        "format of their files stay mapped and take nothing, but for routed experts, which are merged as they are read",
    ),
    HOST_READ: Label(
        Category.TEMPORARY,
        "a whole file of a checkpoint: trained weights (none under ZeRO-3), or master and states of the rank's part; "
        "both without ZeRO (torch.load)",
    ),
    HOST_WRITTEN: Label(
        Category.TEMPORARY,
        "the rank's largest storage of a checkpoint, copied to be written, and a share of rank 0's (torch.save)",
    ),
    HOST_EXPORT: Label(
        Category.PARAMETER,
        "whole weights, or adapters, on rank 0 until they are written (train/export.py); a rank's share of a node's",
    ),
    FROZEN: Label(Category.PARAMETER, "elements x width; under ZeRO-3 each tensor / ranks, rounded up", Basis.EXACT),
    WEIGHTS: Label(
        Category.PARAMETER,
        "elements x width, padded to 2 x ranks under ZeRO-1/2 (nccl_start_alignment_factor); per tensor / ranks, "
        "rounded up, under ZeRO-3",
        Basis.EXACT,
    ),
    MASTER: Label(Category.OPTIMIZER, "4 B x trained elements / ranks (single_partition_of_fp32_groups)", Basis.EXACT),
    MOMENTS: Label(
        Category.OPTIMIZER, "AdamW: 2 x 4 B x trained elements / ranks; made in the first step", Basis.EXACT
    ),
    GRADIENTS: Label(Category.GRADIENT, "width x trained elements whose backward is done (param.grad)"),
    GRAD_PARTITION: Label(
        Category.GRADIENT, "width x elements of every parameter that touches the rank's partition (grads_in_partition)"
    ),
    ACCUMULATED: Label(Category.GRADIENT, "the gradient partition of earlier micro-batches (all_grad_tensors)"),
    WIDE_GRADIENTS: Label(
        Category.GRADIENT, "4 B x trained elements, from the engine's start on (bf16_optimizer.py)", Basis.EXACT
    ),
    BUCKET: Label(
        Category.COMMUNICATION,
        "reduce_bucket_size x width, whatever the model's size (stage_1_and_2.py, setup_buckets)",
    ),
    REDUCTION: Label(Category.COMMUNICATION, "a flattened copy of the bucket's elements (allreduce_bucket)"),
    DDP_BUCKETS: Label(
        Category.COMMUNICATION,
        "width x trained elements: DDP's reducer copies each gradient into a bucket (gradient_as_bucket_view is off)",
    ),
    INIT: Label(Category.TEMPORARY, "flat copies of weights and master made while the engine starts"),
    NORM: Label(Category.TEMPORARY, "8 B x largest gradient slice of the partition (get_grad_norm_direct)"),
    FLAT_GRAD: Label(Category.GRADIENT, "the partition's gradients as one tensor, in the master's format (step)"),
    STAGED: Label(
        Category.OPTIMIZER,
        "Muon under ZeRO-1 and 2: width x elements of every matrix that touches the rank's partition, kept between "
        "steps (_muon_staging_momentum)",
    ),
    UPDATES: Label(
        Category.GRADIENT, "Muon's results: width x elements of whole matrices, until their step (get_flat_partition)"
    ),
    MUON_GATHERS: Label(
        Category.COMMUNICATION,
        "Muon under ZeRO-3: whole gradients and momentum of about a bucket, and up to 256 MiB kept between steps "
        "(_partitioned_buffers_all_gather)",
    ),
    STEP_SCRATCH: Label(Category.TEMPORARY, "temporaries of the optimizer's implementation"),
    GATHERED: Label(Category.PARAMETER, "ZeRO-3: whole weights of the modules in use or not yet released"),
    VIEWED: Label(
        Category.PARAMETER,
        "ZeRO-3: whole weights that a transposed view, saved for backward, keeps after their release "
        "(experts, Falcon's linears)",
    ),
    GATHER_BUFFER: Label(Category.COMMUNICATION, "ZeRO-3: flat receive buffers of gathers in flight"),
    SECONDARY: Label(
        Category.PARAMETER,
        "hpZ: width x elements / zero.hpz_partition_size; of trained ones from their first release to the step's end "
        "(partition_parameters.py, _partition_param_sec)",
    ),
    PERSISTENT: Label(
        Category.PARAMETER, "ZeRO-3: tensors of at most stage3_param_persistence_threshold elements, whole"
    ),
    LOADING: Label(Category.PARAMETER, "weights held twice while the model is built"),
    ANCHORS: Label(
        Category.PARAMETER, "width x trained elements / ranks, each tensor rounded up (L2-SP, EWC)", Basis.EXACT
    ),
    FISHER: Label(Category.PARAMETER, "4 B x trained elements / ranks, each tensor rounded up (EWC)", Basis.EXACT),
    REFERENCE: Label(Category.PARAMETER, "width x elements; / ranks under ZeRO-3 (KL without adapters)", Basis.EXACT),
    KL: Label(
        Category.LOGITS, "logits of the base, the gradient made with the value, up to 256 tokens in fp32 (retain/kl.py)"
    ),
    PULL: Label(
        Category.TEMPORARY, "16 B x the rank's slice of a trained tensor, 20 B under both springs (retain/anchored.py)"
    ),
    HOST_ANCHORS: Label(Category.PARAMETER, "as on the device, beside weights that are offloaded", Basis.EXACT),
    HOST_FISHER: Label(Category.PARAMETER, "as on the device, beside weights that are offloaded", Basis.EXACT),
    HOST_REFERENCE: Label(Category.PARAMETER, "as on the device, offloaded as the weights are", Basis.EXACT),
    SCRATCH: Label(Category.TEMPORARY, "working memory of kernels"),
    "logits": Label(Category.LOGITS, "tokens x vocabulary x width"),
    "gradients of the logits": Label(Category.LOGITS, "tokens x vocabulary x width, up to two at a time in the loss"),
    "loss": Label(Category.LOGITS, "fp32 logits and log-softmax: tokens x vocabulary x 4 B each (ForCausalLMLoss)"),
    "scores of routers": Label(
        Category.ACTIVATION, "tokens x experts x width for each router, until the model's output goes"
    ),
    "token ids and labels": Label(Category.ACTIVATION, "8 B x tokens each", Basis.EXACT),
    "random state": Label(Category.ACTIVATION, "state of the random generator, a copy for each checkpointed layer"),
    "residual stream": Label(Category.ACTIVATION, "tokens x hidden x width for each tensor of the stream that is held"),
    "attention projections": Label(Category.ACTIVATION, "outputs of q, k, v and output projections that are kept"),
    "attention core": Label(Category.ACTIVATION, "rotated q and k, v, the core's result and its row sums (or scores)"),
    "causal mask": Label(Category.ACTIVATION, "seq x seq x width, shared by layers"),
    "rotary tables": Label(Category.ACTIVATION, "2 x seq x rotary width x width, shared by layers"),
    "feed-forward": Label(Category.ACTIVATION, "tokens x intermediate x width for gate, up, activation and product"),
    "routed experts": Label(
        Category.ACTIVATION,
        "a row for each (token, expert) pair: its hidden state, gate and up, activation and product, output",
    ),
    "router": Label(Category.ACTIVATION, "tokens x experts: scores and fp32 softmax; weights of the chosen"),
    "norms": Label(Category.ACTIVATION, "fp32 input, its row scale and the output of each norm that are kept"),
    "weights with their adapters folded in": Label(
        Category.PARAMETER, "width x elements of each adapted parameter of experts and routers, until its backward"
    ),
    "adapters": Label(Category.ACTIVATION, "tokens x rank, and the adapters' outputs while they are added"),
    "adapters: dropped input": Label(Category.ACTIVATION, "dropout's result and mask on each adapter's input"),
    AUTOCAST_COPIES: Label(Category.PARAMETER, "2 B x trained linear weights, kept for backward"),
    "activation gradients": Label(Category.TEMPORARY, "gradients of activations on their way through backward"),
    "temporary of an operator": Label(Category.TEMPORARY, "tensors that live within one operator"),
    "gradient of the weight in hand": Label(Category.GRADIENT, "width x elements of the weight whose backward runs"),
}


def term(name: str, num_bytes: int, place: Place = Place.DEVICE) -> Term:
    """The ledger's line for a heading."""
    label = LABELS[name]
    return Term(name, num_bytes, label.category, label.basis, label.note, place)
