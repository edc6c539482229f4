"""What transformers' training arguments and a loaded model say, as a RunSpec."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from vramplan.errors import SpecError
from vramplan.measure.zero_keys import renamed
from vramplan.memory.estimate import UncoveredError
from vramplan.spec.run import HardwareSpec, OptimizerSpec, RunSpec, ZeroSpec
from vramplan.spec.trainable import FullMethod, LoraMethod, Method
from vramplan.spec.training import TrainingSpec

_OPTIMIZERS = {
    "adamw_torch": "adamw_torch",
    "adamw_torch_fused": "adamw_torch_fused",
    "adamw_bnb_8bit": "adamw_8bit",
    "adamw_8bit": "adamw_8bit",
    "sgd": "sgd",
    "adafactor": "adafactor",
}
_TORCH_PRECISIONS = {torch.float32: ("fp32", "bf16-autocast"), torch.bfloat16: ("bf16", "bf16-weights-autocast")}
"""By the format of the weights: without autocast, and under autocast to bf16."""

_UNCOUNTED_ADAPTERS = (
    "modules_to_save",
    "layers_to_transform",
    "exclude_modules",
    "rank_pattern",
    "bias",
    "trainable_token_indices",
    "layer_replication",
    "target_parameters",
    "lora_bias",
)
"""Fields of ``peft.LoraConfig`` that add or leave out weights in ways that a RunSpec does not say."""


def run_of_trainer(args: Any, model: Any, seq_len: int | None, attention_mask: bool) -> RunSpec:
    """The closed run that a Trainer is about to make.

    Raises:
        UncoveredError: one that the arithmetic has no terms for.
        SpecError: the length of sequences is nowhere.
    """
    length = seq_len or getattr(args, "max_length", None)
    if length is None:
        raise SpecError("FitCallback needs seq_len: the training arguments have no max_length")
    if getattr(args, "activation_offloading", False):
        raise UncoveredError("TRL's activation_offloading, which moves every activation, is not counted")
    zero = _zero(args)
    engine = "torch" if zero is None else "deepspeed"
    world_size, micro = int(args.world_size), int(args.per_device_train_batch_size)
    accumulation = int(args.gradient_accumulation_steps)
    fields = model.config.to_dict()
    kind = "cpu" if args.device.type == "cpu" else None
    return RunSpec(
        model=str(fields.get("_name_or_path") or "the Trainer's model"),
        model_config_fields=fields,
        method=_method(model),
        engine=engine,
        precision=_precision(args, model, engine),
        seq_len=int(length),
        global_batch_size=micro * accumulation * world_size,
        micro_batch_size=micro,
        grad_accum_steps=accumulation,
        attention=model.config._attn_implementation,
        attention_mask=attention_mask,
        **_checkpointing(args),
        optimizer=_optimizer(args),
        **_loss_and_kernels(args, model),
        zero=ZeroSpec(**zero or {"stage": 0, "offload_optimizer": "none", "offload_param": "none"}),
        hardware=HardwareSpec(gpu=kind, gpus_per_node=world_size),
        training=TrainingSpec(max_grad_norm=args.max_grad_norm or 0.0),
    )


def _checkpointing(args: Any) -> dict[str, Any]:
    """Which layers are computed again, and how: without keywords for torch transformers says ``use_reentrant=False``
    (modeling_utils.py, ``gradient_checkpointing_enable``), with others of them torch takes its own default, True
    (utils/checkpoint.py, ``checkpoint``).

    Raises:
        UncoveredError: what is kept lies in pinned host memory.
    """
    if not args.gradient_checkpointing:
        return {"activation_checkpointing": "none"}
    asked = dict(args.gradient_checkpointing_kwargs or {})
    every = asked.pop("every_n_layers", 1)
    if asked.pop("offload", False):
        raise UncoveredError("gradient_checkpointing_kwargs: offload to pinned host memory is not counted")
    reentrant = asked.get("use_reentrant")
    return {
        "activation_checkpointing": "full",
        "checkpoint_every": every,
        "checkpoint_reentrant": bool(asked) if reentrant is None else bool(reentrant),
    }


_LIGER_KERNELS = ("rope", "rms_norm", "swiglu")


def _loss_and_kernels(args: Any, model: Any) -> dict[str, str]:
    """Which loss and which kernels compute, as ``loss`` and ``kernels`` of a run.

    transformers' ``use_liger_kernel`` puts liger's in, all but its plain cross-entropy unless ``liger_kernel_config``
    says otherwise (liger_kernel/transformers/monkey_patch.py, ``apply_liger_kernel_to_llama``). Of TRL's ``loss_type``
    ``nll`` is the model's own; left out it is ``chunked_nll``, with liger ``nll`` (trl/trainer/sft_config.py).

    Raises:
        UncoveredError: a loss of TRL's that makes logits in parts or keeps more of them, or some of liger's kernels.
    """
    if _has_fused_head(model):
        raise UncoveredError("TRL's fused head, which makes logits and loss tile by tile, is not counted")
    uses_liger = bool(getattr(args, "use_liger_kernel", False))
    kind = getattr(args, "loss_type", "nll") or ("nll" if uses_liger else "chunked_nll")
    if kind != "nll":
        raise UncoveredError(f"TRL's loss_type {kind} is not counted: set loss_type nll")
    if not uses_liger:
        return {"loss": "hf", "kernels": "hf"}
    asked = getattr(args, "liger_kernel_config", None) or {}
    if asked.get("cross_entropy", False):
        raise UncoveredError("liger's cross_entropy over whole logits is not counted: use fused_linear_cross_entropy")
    chosen = {asked.get(name, True) for name in _LIGER_KERNELS}
    if len(chosen) > 1:
        raise UncoveredError(
            f"some of liger's kernels ({', '.join(_LIGER_KERNELS)}) without the others are not counted"
        )
    fused = asked.get("fused_linear_cross_entropy", True)
    return {"loss": "liger" if fused else "hf", "kernels": "liger" if chosen.pop() else "hf"}


def _has_fused_head(model: Any) -> bool:
    """Whether TRL has put its own head into the model's forward (trl 1.16, trainer/utils.py, ``add_fused_lm_head``).

    Its tiles of 4096 tokens are bounded on a GPU, but not smaller than whole logits for short batches, and on the CPU
    some nine of them are alive: the logits that are counted otherwise would say too little.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "fused_lm_head" in inspect.signature(inner.forward, follow_wrapped=False).parameters


def _zero(args: Any) -> dict[str, Any] | None:
    """DeepSpeed's section in our words; None where there is no DeepSpeed.

    Raises:
        UncoveredError: FSDP, or a key of the section that is not counted.
    """
    plugin = getattr(args, "deepspeed_plugin", None)
    if plugin is None:
        if getattr(args, "fsdp", None):
            raise UncoveredError("FSDP is not counted")
        return None
    section = {
        name: value
        for name, value in renamed(plugin.deepspeed_config.get("zero_optimization", {})).items()
        if value not in (None, "auto")
    }
    places = {name: _place(name, section.pop(name, "none")) for name in ("offload_optimizer", "offload_param")}
    for name in section.keys() - ZeroSpec.model_fields.keys() - {_OLD_NAME_OF_GATHER}:
        if section.pop(name):
            raise UncoveredError(f"zero_optimization.{name} is not counted")
    section.pop(_OLD_NAME_OF_GATHER, None)
    return {"stage": 0, **section, **places}


_OLD_NAME_OF_GATHER = "stage3_gather_fp16_weights_on_model_save"
"""deepspeed/runtime/zero/config.py: deprecated; it says how weights are saved."""


def _place(name: str, section: Any) -> str:
    """Where states or weights lie; DeepSpeed has it as a section of its own, whose other keys leave all of it there."""
    if not isinstance(section, dict):
        return str(section)
    if section.get("ratio", 1.0) != 1.0 or section.get("super_offload", False):
        raise UncoveredError(f"zero_optimization.{name}: a part of it elsewhere (ratio, super_offload) is not counted")
    return section.get("device") or "none"


def _precision(args: Any, model: Any, engine: str) -> str:
    """DeepSpeed's formats; without it transformers' autocast over the weights as they were loaded."""
    if engine == "deepspeed":
        return "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"
    stored = next((param.dtype for param in model.parameters() if param.is_floating_point()), None)
    if args.fp16 or stored not in _TORCH_PRECISIONS:
        raise UncoveredError(f"autocast to fp16, and weights in {stored}, are not counted")
    return _TORCH_PRECISIONS[stored][bool(args.bf16)]


def _optimizer(args: Any) -> OptimizerSpec:
    name = getattr(args.optim, "value", str(args.optim))
    if name not in _OPTIMIZERS:
        raise UncoveredError(f"the optimizer {name} is not counted")
    return OptimizerSpec(kind=_OPTIMIZERS[name], lr=args.learning_rate)


def _method(model: Any) -> Method:
    if not hasattr(model, "peft_config"):
        frozen = sum(not param.requires_grad for param in model.parameters())
        if frozen:
            raise UncoveredError(f"{frozen} frozen parameters without adapters are not counted")
        return FullMethod()
    (config,) = model.peft_config.values()
    if config.peft_type.value != "LORA":
        raise UncoveredError(f"adapters of kind {config.peft_type.value} are not counted")
    for name in _UNCOUNTED_ADAPTERS:
        value = getattr(config, name, None)
        if value not in (None, "none", False) and value != {} and value != []:
            raise UncoveredError(f"adapters with {name} {value} are not counted")
    if getattr(model, "is_loaded_in_8bit", False):
        raise UncoveredError("weights in 8 bits are not counted")
    targets = config.target_modules
    return LoraMethod(
        kind="qlora" if getattr(model, "is_loaded_in_4bit", False) else "lora",
        r=config.r,
        alpha=config.lora_alpha,
        dropout=config.lora_dropout,
        target_modules=targets if isinstance(targets, str) else tuple(sorted(targets)),
        use_dora=config.use_dora,
        use_rslora=config.use_rslora,
    )
