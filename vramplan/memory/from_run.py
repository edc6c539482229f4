"""The job that a closed run describes: fields of a spec in the arithmetic's own terms."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from vramplan.errors import SpecError
from vramplan.facts.architecture import Architecture
from vramplan.facts.device import Node
from vramplan.facts.dtype import Dtype
from vramplan.memory.job import Job
from vramplan.memory.parameters import parameters
from vramplan.memory.rows import chunk_rows, fused_loss_rows, kl_chunk_tokens, tile_rows
from vramplan.memory.tensor_parallel import split, why_not
from vramplan.spec.layout import Layout
from vramplan.spec.run import RunSpec
from vramplan.spec.targets import resolve_targets, saved_modules
from vramplan.spec.trainable import FullMethod, LoraMethod, Method, check_trains


def job_from_run(
    run: RunSpec, node: Node, architecture: Architecture, weights_halved: bool = False, managed: bool = False
) -> Job:
    """The job that a closed run describes.

    ``managed``: whether DeepSpeed counts micro-batches, as where records are measured; the trainer lets it only where
    it must (``emit/deepspeed.py``, ``managed_accumulation``).

    ``weights_halved``: ``zero.Init`` was told fp32 on a CPU without fp16 and made bf16 weights all the same
    (deepspeed 0.19.8, partition_parameters.py, ``_set_dtype``), while the engine goes on in fp32.

    Raises:
        SpecError: a field that the planner decides is still None, or the method trains nothing.
    """
    _check_decided(run)
    method, adapted = _adapted(run.method, architecture)
    assert run.micro_batch_size is not None
    assert run.grad_accum_steps is not None
    assert run.zero.stage is not None
    formats = _formats(run, weights_halved)
    layout = run.layout if run.layout is not None else Layout(dp=node.world_size)
    num_tokens = run.micro_batch_size * (run.seq_len // layout.sp)
    on_cpu = node.device.kind == "cpu"
    return Job(
        architecture=split(architecture, layout.tp),
        method=method,
        adapted_parameters=adapted,
        engine=run.engine,
        dtype=formats.weights,
        autocast=formats.autocast,
        grad_dtype=formats.grads,
        # runtime/engine.py, _configure_distributed_model: seq_parallel_communication_data_type, "fp32"
        communicates=Dtype.FP32 if layout.sp > 1 else formats.communicates,
        weights_halved=weights_halved,
        master_dtype=Dtype.BF16 if run.bf16_master_weights_and_grads else Dtype.FP32,
        moment_dtype=Dtype.BF16 if run.bf16_optimizer_states else Dtype.FP32,
        layout=layout,
        split_refused=why_not(architecture, layout.tp),
        unsplit_numel=architecture.num_params - split(architecture, layout.tp).num_params if layout.tp > 1 else 0,
        zero=run.zero,
        stage=run.zero.stage,
        micro_batch_size=run.micro_batch_size,
        seq_len=run.seq_len,
        grad_accum_steps=run.grad_accum_steps,
        checkpointing=run.activation_checkpointing == "full",
        checkpoint_every=run.checkpoint_every,
        reentrant=run.checkpoint_reentrant,
        attention=run.attention,
        optimizer=run.optimizer.kind,
        momentum=run.optimizer.momentum,
        device="cpu" if on_cpu else "cuda",
        keep_outputs=run.keep_outputs,
        loss=run.loss,
        shifted_logits=run.shifted_logits,
        chunk_rows=chunk_rows(run.loss, num_tokens, architecture) if on_cpu else (0, 0),
        fused_loss_rows=fused_loss_rows(run.loss, num_tokens, architecture),
        liger_kernels=run.kernels == "liger",
        tile_rows=tile_rows(run.micro_batch_size, run.seq_len // layout.sp, architecture) if run.tiled_mlp else 0,
        host_checkpoints=run.offload_activations == "cpu" and run.activation_checkpointing == "full" and not on_cpu,
        kl_chunk_tokens=kl_chunk_tokens(run.retain, num_tokens),
        offload_optimizer=run.zero.offload_optimizer in ("cpu", "nvme"),
        offload_param=run.zero.offload_param in ("cpu", "nvme"),
        clipping=run.training.max_grad_norm > 0,
        # flash-attn takes packed documents as they lie
        masked=run.masked
        if run.attention != "flash_attention_2" and architecture.masks_by_document
        else run.attention_mask,
        given_positions=run.data.packing != "none" or layout.sp > 1,
        retain=run.retain,
        managed=managed or (bool(run.zero.overlap_comm) and run.zero.stage < 2),
    )


@dataclass(frozen=True, slots=True)
class _Formats:
    weights: Dtype
    autocast: Dtype | None
    grads: Dtype
    communicates: Dtype | None


def _formats(run: RunSpec, weights_halved: bool) -> _Formats:
    dtype, autocast = {
        "bf16": (Dtype.BF16, None),
        "fp16": (Dtype.FP16, None),
        "fp32": (Dtype.FP32, None),
        "bf16-autocast": (Dtype.FP32, Dtype.BF16),
        "bf16-weights-autocast": (Dtype.BF16, Dtype.BF16),
    }[run.precision]
    if not weights_halved and run.grad_accum_dtype == "fp32" and dtype is not Dtype.FP32:
        return _Formats(dtype, autocast, Dtype.FP32, dtype)  # reduced as it is (engine.py, communication_data_type)
    if not weights_halved:
        return _Formats(dtype, autocast, dtype, None)
    # of the products autocast changes those of adapters alone, which are made in fp32 after ``zero.Init``
    return _Formats(Dtype.BF16, autocast if isinstance(run.method, LoraMethod) else None, Dtype.FP32, autocast)


def _check_decided(run: RunSpec) -> None:
    decided = {
        "micro_batch_size": run.micro_batch_size,
        "grad_accum_steps": run.grad_accum_steps,
        "zero.stage": run.zero.stage,
        "activation_checkpointing": run.activation_checkpointing,
    }
    missing = [name for name, value in decided.items() if value is None]
    if missing:
        raise SpecError(
            f"{', '.join(missing)} must be set before bytes can be counted; let the planner choose or set it"
        )


def _adapted(method: Method, architecture: Architecture) -> tuple[Method, frozenset[str]]:
    """The method with its targets resolved, and the parameters that adapters take as they are."""
    if isinstance(method, FullMethod):
        if method.freezes:
            _check_trains(architecture, method)
        return method, frozenset()
    targets = resolve_targets(method, architecture)
    method, adapted = targets.method, targets.parameters if architecture.mixtures else frozenset[str]()
    method = method.model_copy(update={"modules_to_save": tuple(saved_modules(method, architecture))})
    if not adapted:
        _check_targets(architecture, method)
    elif method.dropout or method.use_dora:
        field = "dropout" if method.dropout else "use_dora"
        raise SpecError(
            f"method.{field}: PEFT has no such adapters for parameters, as {architecture.family}'s experts and "
            "routers are; leave it out, or name target_modules that are attention's alone (q_proj, v_proj)"
        )
    return method, adapted


@lru_cache(maxsize=256)
def _check_trains(architecture: Architecture, method: FullMethod) -> None:
    check_trains(method, (param.name for param in parameters(architecture, method)), architecture.num_layers)


def _check_targets(architecture: Architecture, method: LoraMethod) -> None:
    if any(param.adapter for param in parameters(architecture, method)):
        return
    known = sorted({linear.name.rpartition(".")[2] for linear in architecture.layers[0].linears()})
    if method.target_modules in known:
        raise SpecError(
            f"method.target_modules: the text {method.target_modules!r} is a pattern that whole names of modules would "
            f"have to match (PEFT), and none does; for modules of that name write [{method.target_modules}]"
        )
    targets = method.target_modules
    shown = repr(targets) if isinstance(targets, str) else f"[{', '.join(targets)}]"
    raise SpecError(
        f"method.target_modules: {shown} matches no projection of the model, so nothing would be trained; name some of "
        f"{', '.join(known)}, or all-linear"
    )
