"""RunSpec -> DeepSpeed's config dictionary: the only file that spells DeepSpeed's keys (read in 0.19.8)."""

from __future__ import annotations

from typing import Any

from vramplan.errors import SpecError
from vramplan.spec.run import OptimizerSpec, RunSpec, ZeroSpec

_STAGE3_SIZES = (
    "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold",
    "stage3_model_persistence_threshold",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "sub_group_size",
)
_UNLESS_DEFAULT = (
    "round_robin_gradients",
    "use_multi_rank_bucket_allreduce",
    "parameter_alignment",
    "allgather_partitions",
    "ignore_unused_parameters",
    "elastic_checkpoint",
    "load_from_fp32_weights",
)
_STAGE3_UNLESS_DEFAULT = (
    "stage3_gather_16bit_weights_on_model_save",
    "stage3_allgather_sequential",
    "stage3_use_all_reduce_for_fetch_params",
    "stage3_module_granularity_threshold",
    "memory_efficient_linear",
    "override_module_apply",
    "log_trace_cache_warnings",
    "enable_sanity_checks",
    "pipeline_loading_checkpoint",
)
CLIENT_OPTIMIZERS = frozenset({"adamw_torch_fused", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"})
"""Optimizers that DeepSpeed cannot build by name: the trainer builds them and hands them over."""


def ds_config(run: RunSpec, world_size: int) -> dict[str, Any]:
    """DeepSpeed's config of a closed run (micro-batch, accumulation, stage and offload decided).

    Raises:
        SpecError: a field that the planner decides is still None, or the layout does not make ``world_size`` ranks.
    """
    if run.engine != "deepspeed":
        raise SpecError(f"engine {run.engine} has no DeepSpeed config and is not trained here: use engine deepspeed")
    _check_closed(run, world_size)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": run.micro_batch_size,
        "gradient_accumulation_steps": run.grad_accum_steps,
        "managed_gradient_accumulation": managed_accumulation(run),
        "gradient_clipping": run.training.max_grad_norm,
        "zero_optimization": _zero_section(run.zero),
        **_precision_section(run),
        **_parallel_section(run),
    }
    if run.optimizer.kind not in CLIENT_OPTIMIZERS:
        config["optimizer"] = _optimizer_section(run.optimizer, run.peak_lr)
    if run.optimizer.kind not in ("adamw", "adamw_torch"):
        # DeepSpeed holds only its own and torch's Adam as tested under ZeRO (runtime/zero/utils.py)
        config["zero_allow_untested_optimizer"] = True
    if run.optimizer.kind != "adamw":
        # without this an optimizer that is handed over is refused beside offload (_configure_optimizer)
        config["zero_force_ds_cpu_optimizer"] = False
    return config


def managed_accumulation(run: RunSpec) -> bool:
    """Whether DeepSpeed must count micro-batches itself.

    False wherever DeepSpeed allows it: the loop then owns the boundary, and the number of micro-batches may change
    from step to step. Refused by DeepSpeed for ZeRO 0 and 1 with ``overlap_comm`` and for pipelines
    (runtime/engine.py, ``_do_sanity_check``).
    """
    overlaps_below_stage_2 = bool(run.zero.overlap_comm) and (run.zero.stage or 0) < 2
    return overlaps_below_stage_2 or (run.layout is not None and run.layout.pp > 1)


def _check_closed(run: RunSpec, world_size: int) -> None:
    for name in ("micro_batch_size", "grad_accum_steps"):
        if getattr(run, name) is None:
            raise SpecError(f"{name} is not decided: plan the run first, or set it")
    if run.zero.stage is None:
        raise SpecError("zero.stage is not decided: plan the run first, or set it to 0, 1, 2 or 3")
    if run.layout is not None and run.layout.world_size != world_size:
        raise SpecError(f"layout makes {run.layout.world_size} ranks, but {world_size} are to run: change layout.dp")


def _precision_section(run: RunSpec) -> dict[str, Any]:
    section: dict[str, Any] = {}
    if run.precision in ("bf16", "fp16"):
        asked = ("bf16_master_weights_and_grads", "bf16_optimizer_states")
        section[run.precision] = {"enabled": True} | {name: True for name in asked if getattr(run, name)}
    if run.precision == "bf16-autocast":
        section["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    if run.grad_accum_dtype is not None:
        section["data_types"] = {"grad_accum_dtype": run.grad_accum_dtype}
    return section


def _zero_section(zero: ZeroSpec) -> dict[str, Any]:
    section: dict[str, Any] = {"stage": zero.stage}
    if zero.overlap_comm is not None:
        section["overlap_comm"] = zero.overlap_comm
    for name in ("reduce_bucket_size", "allgather_bucket_size", "contiguous_gradients", "reduce_scatter"):
        section[name] = getattr(zero, name)
    rare = _UNLESS_DEFAULT + (_STAGE3_UNLESS_DEFAULT if zero.stage == 3 else ())
    defaults = ZeroSpec.model_fields
    section |= {name: value for name in rare if (value := getattr(zero, name)) != defaults[name].default}
    if zero.stage == 3:
        section.update({name: getattr(zero, name) for name in _STAGE3_SIZES})
        if zero.hpz_partition_size > 1:
            section["zero_hpz_partition_size"] = zero.hpz_partition_size
    for name in ("offload_optimizer", "offload_param"):
        where = getattr(zero, name)
        if where == "nvme":
            section[name] = {"device": "nvme", "nvme_path": _nvme_path(zero), "pin_memory": True}
        elif where == "cpu":
            section[name] = {"device": "cpu", "pin_memory": True}
    return section


def _nvme_path(zero: ZeroSpec) -> str:
    if zero.nvme_path is None:
        raise SpecError("zero.nvme_path is not set, but offload to nvme writes there: name a directory on the disk")
    return zero.nvme_path


def _optimizer_section(optimizer: OptimizerSpec, lr: float) -> dict[str, Any]:
    adam = {"lr": lr, "betas": list(optimizer.betas), "eps": optimizer.eps, "weight_decay": optimizer.weight_decay}
    if optimizer.kind == "adamw":
        return {"type": "AdamW", "params": adam}
    if optimizer.kind == "adamw_torch":
        return {"type": "AdamW", "params": adam | {"torch_adam": True}}
    if optimizer.kind == "lion":
        return {"type": "Lion", "params": {name: adam[name] for name in ("lr", "betas", "weight_decay")}}
    momentum = {"momentum": optimizer.momentum} if optimizer.kind in ("sgd", "muon") and optimizer.momentum else {}
    if optimizer.kind == "muon":  # one rate for both halves (runtime/engine.py, _muon_param_groups)
        return {"type": "Muon", "params": adam | momentum}
    # any other name is looked up in torch.optim (runtime/engine.py, _configure_basic_optimizer)
    name = {"sgd": "SGD", "adafactor": "Adafactor"}[optimizer.kind]
    return {"type": name, "params": {"lr": lr, "weight_decay": optimizer.weight_decay, **momentum}}


def _parallel_section(run: RunSpec) -> dict[str, Any]:
    layout = run.layout
    if layout is None:
        return {}
    section: dict[str, Any] = {}
    if layout.tp > 1:
        section["tensor_parallel"] = {"autotp_size": layout.tp}
    if layout.sp > 1:
        section |= {"sequence_parallel_size": layout.sp, "data_parallel_size": layout.dp}
    return section
