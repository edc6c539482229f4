"""A record's spec as the run that it asks for, and back."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from vramplan.errors import SpecError
from vramplan.measure.record import JobModel, JobSpec, World
from vramplan.spec.data import DataSpec
from vramplan.spec.invalid import describe_errors
from vramplan.spec.layout import Layout
from vramplan.spec.run import OptimizerSpec, RunSpec
from vramplan.spec.training import TrainingSpec


def run_from_record_spec(spec: JobSpec) -> tuple[RunSpec, Layout]:
    """The closed RunSpec (every None decided) that says what the record's program ran, and its layout.

    Raises:
        SpecError: fields that cannot stand together, such as plain PyTorch and a ZeRO stage.
    """
    layout = spec.layout
    zero = spec.zero.model_copy(
        update={
            "stage": spec.zero.stage or 0,
            "offload_optimizer": spec.zero.offload_optimizer or "none",
            "offload_param": spec.zero.offload_param or "none",
        }
    )
    hardware = spec.hardware
    if spec.cap_bytes is not None:
        hardware = hardware.model_copy(update={"memory_cap": spec.cap_bytes})
    try:
        run = RunSpec(
            model=spec.model.name,
            model_config_fields=spec.model.config,
            method=spec.method,
            engine=spec.engine,
            precision=spec.precision,
            grad_accum_dtype=spec.grad_accum_dtype,
            bf16_master_weights_and_grads=spec.bf16_master_weights_and_grads,
            bf16_optimizer_states=spec.bf16_optimizer_states,
            seq_len=spec.seq_len,
            global_batch_size=spec.micro_batch_size * spec.grad_accum_steps * layout.dp,
            micro_batch_size=spec.micro_batch_size,
            grad_accum_steps=spec.grad_accum_steps,
            attention=spec.attention,
            attention_mask=spec.attention_mask,
            activation_checkpointing=spec.activation_checkpointing,
            checkpoint_every=spec.checkpoint_every,
            checkpoint_reentrant=spec.checkpoint_reentrant,
            loss=spec.loss,
            kernels=spec.kernels,
            tiled_mlp=spec.tiled_mlp,
            offload_activations=spec.offload_activations,
            shifted_logits=spec.shifted_logits,
            keep_outputs=spec.keep_outputs,
            retain=spec.retain,
            data=DataSpec(packing="best_fit" if spec.masked and not spec.attention_mask else "none"),
            optimizer=OptimizerSpec(kind=spec.optimizer, lr=1e-5, weight_decay=0.01, momentum=spec.momentum),
            zero=zero,
            layout=layout,
            alloc_conf=spec.alloc_conf,
            hardware=hardware,
            # clipping at 1.0 is part of a record's form, which has no key for another norm
            training=TrainingSpec(max_steps=spec.steps, max_grad_norm=1.0),
        )
    except ValidationError as error:
        raise SpecError(f"job {spec.id}: {describe_errors(RunSpec, error)}") from error
    return run, layout


def record_spec_from_run(run: RunSpec, config: dict[str, Any], layout: Layout, run_id: str = "") -> JobSpec:
    """The spec under which a closed run is recorded; ``config``: the fields of the model's ``config.json``."""
    return JobSpec(
        id=run_id,
        model=JobModel(name=run.model, config=config),
        engine=run.engine,
        precision=run.precision,
        grad_accum_dtype=run.grad_accum_dtype,
        bf16_master_weights_and_grads=run.bf16_master_weights_and_grads,
        bf16_optimizer_states=run.bf16_optimizer_states,
        micro_batch_size=run.micro_batch_size or 1,
        seq_len=run.seq_len,
        grad_accum_steps=run.grad_accum_steps or 1,
        attention=run.attention,
        attention_mask=run.attention_mask,
        masked=run.masked,
        activation_checkpointing=run.activation_checkpointing or "none",
        checkpoint_every=run.checkpoint_every,
        checkpoint_reentrant=run.checkpoint_reentrant,
        loss=run.loss,
        kernels=run.kernels,
        tiled_mlp=run.tiled_mlp,
        offload_activations=run.offload_activations,
        shifted_logits=run.shifted_logits,
        method=run.method,
        optimizer=run.optimizer.kind,
        momentum=run.optimizer.momentum,
        zero=run.zero,
        world=World(dp=layout.dp, tp=layout.tp, sp=layout.sp, pp=layout.pp),
        alloc_conf=run.alloc_conf,
        hardware=run.hardware,
        keep_outputs=run.keep_outputs,
        retain=run.retain,
    )
