"""The estimate of one closed run: the only place that puts the terms together."""

from __future__ import annotations

from vramplan.errors import SpecError
from vramplan.facts.architecture import Architecture
from vramplan.facts.attention import has_attention
from vramplan.facts.device import Node
from vramplan.facts.dtype import Dtype
from vramplan.memory.between import Passed, moments_between
from vramplan.memory.blocks.fused_loss import FAMILIES as FUSED_LOSS_FAMILIES
from vramplan.memory.blocks.liger import FAMILIES as LIGER_FAMILIES
from vramplan.memory.from_run import job_from_run
from vramplan.memory.job import Job
from vramplan.memory.labels import HOST_ACTIVATIONS, term
from vramplan.memory.ledger import Estimate
from vramplan.memory.nvme import disk_terms, on_disk, why_uncovered
from vramplan.memory.overhead import WORKSPACES, overhead
from vramplan.memory.partition import ranks_that_differ
from vramplan.memory.passes import STEPS_ONLY, Passes
from vramplan.memory.size import evaluate
from vramplan.memory.snapshot import snapshot_terms
from vramplan.memory.term import Place, Term
from vramplan.memory.walked import Moments, walk
from vramplan.spec.run import RunSpec
from vramplan.spec.trainable import LoraMethod


class UncoveredError(SpecError):
    """The arithmetic does not cover this combination yet; the text names what."""


def estimate(
    run: RunSpec,
    node: Node,
    architecture: Architecture,
    rank: int | None = None,
    steps_skipped: bool = False,
    weights_halved: bool = False,
    managed: bool = False,
    passes: Passes = STEPS_ONLY,
) -> Estimate:
    """Bytes of one rank at every moment of a closed run.

    ``rank``: which one; None takes the one that holds most (under ZeRO-1 and 2 partitions differ in what they touch).

    ``steps_skipped``: whether every optimizer step is discarded as an overflow (measurements with undefined weights).
    ``weights_halved``: whether ``zero.Init`` made bf16 weights for an fp32 run (``memory/job.py``).
    ``managed``: whether DeepSpeed counts micro-batches, as in measurement records (``memory/job.py``).
    ``passes``: what the run passes besides its steps (``Passes.of`` says what a spec asks of the trainer).

    Raises:
        SpecError: a field that the planner decides is None, or the combination is not covered.
    """
    job = job_from_run(run, node, architecture, weights_halved, managed)
    check_covered(job)
    basis, shapeless = job.basis, job.shapeless
    ranks = [rank] if rank is not None else ranks_that_differ(shapeless)
    walks = [walk(shapeless, each, steps_skipped) for each in ranks]
    worst = walks[0] if len(walks) == 1 else max(walks, key=lambda walked: walked.peak_bytes(basis))
    passed: tuple[Passed, ...] = tuple((stretch, basis) for stretch in worst.stretches)
    passed += tuple(moments_between(job, worst.standing, passes, node.gpus_per_node))
    phases = tuple(stretch.phase_bytes(at) for stretch, at in passed)
    snapshots = snapshot_terms(job, node.gpus_per_node) if run.training.snapshot_every is not None else ()
    beyond = overhead(node, job.layout, run.alloc_conf, max(phase.peak_bytes for phase in phases))
    return Estimate(
        moments=Moments(passed),
        phases=phases,
        overhead=beyond.terms,
        host_terms=(*_host_terms(passed), *_host_checkpoints(job), *snapshots),
        disk_terms=disk_terms(job),
        capacity_bytes=node.capacity_bytes - _bytes_on_device(node, snapshots),
        ranks_per_node=node.gpus_per_node,
        host_capacity_bytes=node.host_memory_bytes,
        workspace_bytes=sum(term.num_bytes for term in beyond.terms if term.name in WORKSPACES),
        reserved_band=beyond.reserved_band,
        used_band=beyond.used_band,
    )


def estimate_run(run: RunSpec, node: Node, architecture: Architecture, rank: int | None = None) -> Estimate:
    """As ``estimate``, with every moment that the trainer passes in a run as its spec asks.

    Raises:
        SpecError: as ``estimate``.
    """
    return estimate(run, node, architecture, rank=rank, passes=Passes.of(run))


def _bytes_on_device(node: Node, host_terms: tuple[Term, ...]) -> int:
    """What the host's bytes take of the device's: all on the CPU, whose memory is the host's."""
    return sum(each.num_bytes for each in host_terms) if node.device.kind == "cpu" else 0


def _host_checkpoints(job: Job) -> tuple[Term, ...]:
    """The inputs of checkpointed layers of one micro-batch, where they lie in the host's memory, not pinned."""
    if not job.host_checkpoints:
        return ()
    num_tokens = job.micro_batch_size * (job.seq_len // job.layout.sp)
    each = num_tokens * job.architecture.hidden_size * job.dtype.nbytes
    num_layers = sum(job.model_run.recomputes(index) for index in range(job.architecture.num_layers))
    return (term(HOST_ACTIVATIONS, num_layers * each, Place.HOST),)


def _host_terms(passed: tuple[Passed, ...]) -> tuple[Term, ...]:
    """The host's bytes of one rank at their highest."""
    states = [(state, basis) for stretch, basis in passed for state in stretch.host]
    if not states:
        return ()
    most, basis = max(states, key=lambda each: evaluate(each[0].size, each[1]))
    sizes = {name: evaluate(size, basis) for name, size in most.parts.items()}
    return tuple(term(name, size, Place.HOST) for name, size in sizes.items() if size)


def _trains_head(job: Job) -> bool:
    """Whether the head has an adapter or is trained whole beside adapters."""
    method, head = job.method, job.architecture.head.name
    if isinstance(method, LoraMethod) and method.saves(head):
        return True
    return any(param.adapter and param.name.startswith(f"{head}.") for param in job.parameters)


def _saves(job: Job) -> bool:
    return isinstance(job.method, LoraMethod) and bool(job.method.modules_to_save)


def _adapts_positions(job: Job) -> bool:
    """Whether targets name a table of positions."""
    method, tables = job.method, job.architecture.embeddings[1:]
    return isinstance(method, LoraMethod) and any(method.adapts_table(table.name) for table in tables)


COVERED_FAMILIES = frozenset(
    [
        "bloom",
        "cohere",
        "deepseek_v2",
        "deepseek_v3",
        "falcon",
        "gemma",
        "gemma2",
        "gemma3",
        "glm",
        "gpt2",
        "gpt_neox",
        "gpt_oss",
        "granite",
        "llama",
        "llama4",
        "mistral",
        "mixtral",
        "olmo",
        "olmo2",
        "opt",
        "phi",
        "phi3",
        "qwen2",
        "qwen2_moe",
        "qwen3",
        "qwen3_moe",
        "smollm3",
        "stablelm",
        "starcoder2",
    ]
)
"""Families whose blocks have been laid on the tape and compared with measurements."""


def check_covered(job: Job) -> None:
    """Raises:
    UncoveredError: the arithmetic does not count something of the job yet; the text names it.
    """
    uncovered = {**_of_model(job), **_of_optimizer(job), **_of_layout(job), **_of_kernels(job), **why_uncovered(job)}
    named = [name for name, is_so in uncovered.items() if is_so]
    if named:
        raise UncoveredError(f"the estimator does not count {', '.join(named)} yet")


def _of_model(job: Job) -> dict[str, bool]:
    """What of family and method is not counted, and whether the job has it; so below."""
    method, family = job.method, job.architecture.family
    return {
        f"the {family} family": family not in COVERED_FAMILIES,
        f"{job.attention} attention of the {family} family, which transformers lacks": not has_attention(
            family, job.attention
        ),
        f"attention {job.attention} with sinks": job.attention != "eager" and job.architecture.has_sinks,
        "method.fp32_norms under DeepSpeed": method.kind != "full" and method.fp32_norms and job.engine == "deepspeed",
        "QLoRA with zero.hpz_partition_size": job.quantized and job.hpz > 0,
        "adapters on embeddings of positions": _adapts_positions(job),
        "method.modules_to_save beside adapters in fp32 (ZeRO-3 in bf16 and engine torch leave them so)": _saves(job)
        and job.adapter_dtype is not None,
        "method.modules_to_save with retain.kl under ZeRO-3": _saves(job)
        and job.stage == 3
        and job.kl_chunk_tokens > 0,
        "zero.stage3_module_granularity_threshold with adapters, or of layers with experts": job.leaves == "other",
    }


def _of_optimizer(job: Job) -> dict[str, bool]:
    kind, muon = job.optimizer, job.optimizer == "muon"
    return {
        f"offload with the optimizer {kind}": job.offload_optimizer
        and (kind.startswith(("lion", "paged")) or (on_disk(job) and kind != "adamw")),
        f"the optimizer {kind} on the CPU": kind in ("lion", "paged_adamw", "paged_adamw_8bit") and job.device == "cpu",
        "offload with the optimizer muon under ZeRO-3": muon and job.offload_optimizer and job.stage == 3,
        "the optimizer muon with adapters on experts or routers": muon and bool(job.adapted_parameters),
        "the optimizer muon with zero.contiguous_gradients false": muon
        and job.stage in (1, 2)
        and not job.zero.contiguous_gradients,
        "the optimizer muon under tensor or sequence parallelism": muon and max(job.layout.tp, job.layout.sp) > 1,
        "zero.hpz_partition_size with offload of weights": job.hpz > 0 and job.offload_param,
        **_of_formats(job),
    }


def _of_formats(job: Job) -> dict[str, bool]:
    halves, sums, kind = job.master_dtype is not Dtype.FP32, job.sums_in_fp32, job.optimizer
    widens = job.grad_dtype is not job.dtype and not job.weights_halved
    return {
        f"bf16_master_weights_and_grads with the optimizer {kind}": halves
        and kind not in ("adamw", "adamw_torch", "adamw_torch_fused", "lion", "sgd"),
        "bf16_master_weights_and_grads with offload to NVMe": halves and on_disk(job),
        "bf16_master_weights_and_grads with grad_accum_dtype": halves and widens,
        "grad_accum_dtype under ZeRO-1 with fp16 weights": sums and job.stage == 1 and job.dtype is Dtype.FP16,
        "grad_accum_dtype under ZeRO-1 with offload": sums and job.stage == 1 and job.offload_optimizer,
        "grad_accum_dtype under ZeRO-2 without zero.contiguous_gradients or zero.reduce_scatter": sums
        and job.stage == 2
        and not (job.zero.contiguous_gradients and job.zero.reduce_scatter),
        "grad_accum_dtype with the optimizer muon": widens and kind == "muon",
    }


def _of_layout(job: Job) -> dict[str, bool]:
    layout, family = job.layout, job.architecture.family
    split, shares = layout.tp > 1, layout.sp > 1
    return {
        "pipeline or expert parallelism": max(layout.pp, layout.ep) > 1,
        job.split_refused: bool(job.split_refused),
        "tensor parallelism under ZeRO-3": split and job.stage == 3,
        "tensor parallelism with adapters": split and job.method.kind != "full",
        "tensor parallelism with sequence parallelism": split and shares,
        "tensor parallelism with the fused (liger) loss, liger's kernels or tiled MLPs": split
        and (job.loss == "liger" or job.liger_kernels or job.tile_rows > 0),
        "sequence parallelism with latent attention": shares and job.architecture.has_latent_attention,
        "eager attention under sequence parallelism": shares and job.attention == "eager",
        f"sequence parallelism of the {family} family": shares and job.architecture.has_own_core,
        "zero.hpz_partition_size under sequence parallelism": shares and job.hpz > 0,
    }


def _of_kernels(job: Job) -> dict[str, bool]:
    family, own_kernels, fused_loss = (
        job.architecture.family,
        job.liger_kernels or job.tile_rows > 0,
        job.loss == "liger",
    )
    return {
        f"liger's kernels, or tiled MLPs, of the {family} family": own_kernels and family not in LIGER_FAMILIES,
        "liger's kernels, or tiled MLPs, under autocast": own_kernels and job.autocast is not None,
        "tiled MLPs with adapters": job.tile_rows > 0 and job.method.kind != "full",
        "shifted_logits with the chunked loss, which takes the stock loss's place only": job.loss == "chunked"
        and job.shifted_logits,
        f"the fused (liger) loss of the {family} family": fused_loss and family not in FUSED_LOSS_FAMILIES,
        "the fused (liger) loss under autocast of fp32 weights and ZeRO-3": fused_loss
        and job.autocast is not None
        and job.dtype is not job.autocast
        and job.stage == 3,
        "the fused (liger) loss with an adapter on the head": fused_loss and _trains_head(job),
    }
