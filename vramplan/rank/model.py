"""The model of a run: transformers' own class, with its adapters, in the dtype of the precision."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from vramplan.errors import ConfigError, SpecError
from vramplan.facts.expansion import expand_config
from vramplan.rank.tiled import tile_mlps
from vramplan.retain.freeze import freeze
from vramplan.spec.run import RunSpec
from vramplan.spec.trainable import LoraMethod

WEIGHT_STD = 0.02
"""Spread of the random weights: small enough that nothing overflows in bf16 or fp16; bytes do not depend on it."""


_WEIGHT_DTYPES = {"bf16": torch.bfloat16, "bf16-weights-autocast": torch.bfloat16, "fp16": torch.float16}


def weight_dtype(run: RunSpec) -> torch.dtype:
    """What the weights are stored in: bf16-autocast keeps them in fp32 and casts as it computes."""
    return _WEIGHT_DTYPES.get(run.precision, torch.float32)


def transformers_config(run: RunSpec) -> Any:
    """transformers' config object of a run whose ``model_config_fields`` are given.

    Raises:
        ConfigError: there are no fields, or transformers does not know the model type.
    """
    from transformers import AutoConfig

    if not run.model_config_fields:
        raise ConfigError(f"{run.model}: the fields of its config.json are needed to build it")
    fields = dict(run.model_config_fields)
    model_type = fields.pop("model_type", None)
    if model_type is None:
        raise ConfigError(f"{run.model}: config.json has no model_type")
    if has_own_code(model_type, fields):
        return _config_of_own_code(run)
    try:
        config = AutoConfig.for_model(model_type, **fields)
    except ValueError as error:
        raise ConfigError(f"{run.model}: transformers does not know the model type {model_type!r}") from error
    config.use_cache = False
    if run.new_blocks:
        config = type(config).from_dict(expand_config(config.to_dict(), run.new_blocks))
    return config


def has_own_code(model_type: str, fields: Mapping[str, Any]) -> bool:
    """Whether only Python files that come with the model know its type."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return model_type not in CONFIG_MAPPING and "auto_map" in fields


def _config_of_own_code(run: RunSpec) -> Any:
    """The config object that the model's own code makes; raises SpecError unless the user lets it run."""
    from transformers import AutoConfig

    if not run.training.trust_remote_code:
        raise SpecError(
            f"{run.model}: the model comes with Python code of its own, which is run only with --trust-remote-code "
            "(training.trust_remote_code: true)"
        )
    config = AutoConfig.from_pretrained(run.model, trust_remote_code=True)
    config.use_cache = False
    return config


def build_model(
    run: RunSpec, ds_config: dict[str, Any], device: str = "cpu", *, halved: bool = False
) -> torch.nn.Module:
    """The model with random weights, adapters and checkpointing as the run asks, before DeepSpeed's engine.

    Under ZeRO-3 it is built inside ``deepspeed.zero.Init``, which splits each weight as soon as it exists; adapters
    are added after it, in their own dtype, and split by the engine. 4-bit weights are made whole and split by the
    engine too, as where transformers loads them (modeling_utils.py, ``get_init_context``): onto ``device``, before
    there are adapters (quantizers/quantizer_bnb_4bit.py, ``update_device_map``). ``halved``: what is split so is made
    in bf16, whatever the precision.
    """
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    with _partitioned_from_the_start(run, ds_config, halved), no_init_weights():
        model: torch.nn.Module = AutoModelForCausalLM.from_config(
            transformers_config(run),
            dtype=weight_dtype(run),
            attn_implementation=run.attention,
            trust_remote_code=run.training.trust_remote_code,
        )
    model.tie_weights()  # type: ignore[operator]  # left out with the initialisation
    if run.shifted_logits:
        model.loss_function = shifted_loss  # type: ignore[assignment]
    if run.method.kind == "qlora":
        quantize(
            model,
            torch.bfloat16 if run.precision.endswith("autocast") else weight_dtype(run),
            weight_dtype(run) if run.zero.stage == 3 else torch.uint8,
        )
        model.to(device)
    if isinstance(run.method, LoraMethod):
        with _announced_to_peft(run, ds_config):
            model = add_adapters(model, run.method)
        if run.method.fp32_norms:
            widen_norms(model)
    elif run.method.freezes:
        freeze(model, run.method)
    fill_weights(model)
    if run.activation_checkpointing == "full":
        checkpoint_layers(model, run)
    apply_kernels(model, run)
    return model


def shifted_loss(logits: torch.Tensor, labels: torch.Tensor, vocab_size: int, **_: Any) -> torch.Tensor:
    """The loss of transformers up to 4.48: fp32 logits, of which all positions but the last are copied."""
    wide = logits.float()
    shifted = wide[..., :-1, :].contiguous()
    targets = labels[..., 1:].contiguous()
    return torch.nn.functional.cross_entropy(shifted.view(-1, vocab_size), targets.view(-1))


def widen_norms(model: torch.nn.Module) -> None:
    """Norms in fp32, found as TRL finds them (trl/trainer/utils.py, ``peft_module_casting_to_bf16``)."""
    for name, module in model.named_modules():
        if "norm" in name or isinstance(module, torch.nn.LayerNorm):
            module.float()


def quantize(model: torch.nn.Module, compute_dtype: torch.dtype, storage: torch.dtype = torch.uint8) -> None:
    """Keeps linears in 4 bits, NF4 with double quantization, each that transformers would as it loads the model.

    ``storage``: as whose elements the packed bits lie (``bnb_4bit_quant_storage``).

    Which: transformers/integrations/bitsandbytes.py, ``replace_with_bnb_linear``. The head stays, and what is no
    ``nn.Linear`` but a subclass of it (Falcon's).

    Raises:
        SpecError: bitsandbytes is not installed.
    """
    try:
        import bitsandbytes
    except ImportError as error:
        raise SpecError("method.kind: qlora needs bitsandbytes: pip install 'vramplan[qlora]', or use lora") from error
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import get_keys_to_not_convert
    from transformers.quantizers.quantizers_utils import should_convert_module

    kept = get_keys_to_not_convert(model)
    for name in [name for name, _ in model.named_modules()]:  # a list of the modules would keep what is replaced
        module: Any = model.get_submodule(name)
        is_transposed = isinstance(module, Conv1D)
        if not (is_transposed or type(module) is torch.nn.Linear) or not should_convert_module(name, kept):
            continue
        owner, _, own = name.rpartition(".")
        weight = module.weight.data.normal_(std=WEIGHT_STD)
        if is_transposed:
            weight = weight.T
        packed = bitsandbytes.nn.Linear4bit(
            1,
            1,
            bias=False,
            compute_dtype=compute_dtype,
            compress_statistics=True,
            quant_type="nf4",
            quant_storage=storage,
        )
        packed.out_features, packed.in_features = weight.shape
        packed.bias = module.bias
        packed.weight = bitsandbytes.nn.Params4bit(
            weight,
            requires_grad=False,
            compress_statistics=True,
            quant_type="nf4",
            quant_storage=storage,
            module=packed,
        ).to(weight.device)
        setattr(model.get_submodule(owner), own, packed)
        del module, weight
    model.is_loaded_in_4bit = True  # type: ignore[assignment]  # PEFT asks


def add_adapters(model: torch.nn.Module, method: LoraMethod) -> torch.nn.Module:
    """PEFT's wrapper; its default keeps adapters in fp32 beside bf16 weights (``autocast_adapter_dtype``)."""
    from peft import LoraConfig, get_peft_model

    targets = method.target_modules
    config = LoraConfig(
        r=method.r,
        lora_alpha=method.scale_alpha,
        lora_dropout=method.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        target_parameters=list(method.target_parameters) or None,
        modules_to_save=list(method.modules_to_save) or None,
        ensure_weight_tying=bool(method.modules_to_save) and _is_tied(model),
        use_dora=method.use_dora,
        use_rslora=method.use_rslora,
        task_type="CAUSAL_LM",
    )
    wrapped: torch.nn.Module = get_peft_model(model, config)
    return wrapped


def _is_tied(model: Any) -> bool:
    """Whether head and token table are one matrix, whose copy then is one too."""
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    return head is not None and head.weight is table.weight


def checkpoint_layers(model: torch.nn.Module, run: RunSpec) -> None:
    """Recomputes layers in backward, every one or each so-many-th; what is kept for it, each one's input, lies where
    the run says."""
    model.gradient_checkpointing_enable(  # type: ignore[operator]
        gradient_checkpointing_kwargs={"use_reentrant": run.checkpoint_reentrant}, every_n_layers=run.checkpoint_every
    )
    if run.offload_activations == "none":
        return
    for module in model.modules():
        plain = getattr(module, "_gradient_checkpointing_func", None)
        if plain is not None:
            module._gradient_checkpointing_func = _with_inputs_on_host(plain)  # type: ignore[assignment]


def _with_inputs_on_host(checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """torch saves a checkpoint's inputs under the hooks that are set when it is called, all else under its own."""

    def on_host(*args: Any, **kwargs: Any) -> Any:
        with torch.autograd.graph.save_on_cpu():
            return checkpoint(*args, **kwargs)

    return on_host


def apply_kernels(model: torch.nn.Module, run: RunSpec) -> None:
    """Replaces the model's loss, kernels and MLPs by those that the run asks for."""
    if run.loss == "liger" or run.kernels == "liger":
        _apply_liger(model, run)
    if run.loss == "chunked":
        _chunk_loss(model)
    if run.tiled_mlp:
        tile_mlps(model, run)


def _chunk_loss(model: Any) -> None:
    """Gives the causal language model DeepSpeed's chunked loss; a wrapper of adapters has it do the rest.

    Raises:
        SpecError: the model has a loss of its own.
    """
    from deepspeed.runtime.chunked_cross_entropy import install_chunked_causal_lm_loss

    try:
        install_chunked_causal_lm_loss(_without_adapters(model))
    except ValueError as error:
        raise SpecError(f"loss: chunked takes the place of transformers' own loss only: use hf ({error})") from error


def _without_adapters(model: Any) -> Any:
    """The causal language model inside a wrapper of adapters, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _apply_liger(model: torch.nn.Module, run: RunSpec) -> None:
    try:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance
    except ImportError as error:
        raise SpecError(
            "loss: liger and kernels: liger need the package liger-kernel; install it, or use hf for both"
        ) from error
    kernels = run.kernels == "liger"
    _apply_liger_kernel_to_instance(
        model=_without_adapters(model),  # in whose layers it looks for what it replaces
        rope=kernels,
        rms_norm=kernels,
        swiglu=kernels and not run.tiled_mlp,
        cross_entropy=False,
        fused_linear_cross_entropy=run.loss == "liger",
    )


@torch.no_grad()
def fill_weights(model: torch.nn.Module) -> None:
    """Random weights in place: of a weight that ZeRO-3 split, this rank's share."""
    for param in model.parameters():
        if param.is_floating_point() and not hasattr(param, "quant_state"):
            getattr(param, "ds_tensor", param).normal_(std=WEIGHT_STD)


@torch.no_grad()
def leave_undefined(model: torch.nn.Module) -> None:
    """Weights that ZeRO-3 split as memory without values may read, so that no step comes through: NaN."""
    for param in model.parameters():
        if hasattr(param, "ds_tensor"):
            param.ds_tensor.fill_(float("nan"))


def _partitioned_from_the_start(run: RunSpec, ds_config: dict[str, Any], halved: bool) -> AbstractContextManager[Any]:
    """``zero.Init`` as transformers enters it (modeling_utils.py, ``get_init_context``): its config says the format.
    Told one, DeepSpeed 0.19.8 takes bf16 instead of it on a CPU without fp16 (partition_parameters.py:397)."""
    if run.zero.stage != 3 or run.method.kind == "qlora":
        return nullcontext()
    import deepspeed

    context: AbstractContextManager[Any] = deepspeed.zero.Init(
        config_dict_or_path=ds_config, dtype=torch.bfloat16 if halved else None, remote_device=None
    )
    return context


@contextmanager
def _announced_to_peft(run: RunSpec, ds_config: dict[str, Any]) -> Iterator[None]:
    """PEFT gathers a weight that ZeRO-3 split for DoRA's first norm if transformers says that there are such
    (peft/utils/integrations.py, ``gather_params_ctx``): while an object like this one lives."""
    from transformers.integrations import HfDeepSpeedConfig

    announced = HfDeepSpeedConfig(ds_config) if run.zero.stage == 3 else None
    try:
        yield
    finally:
        del announced
