"""The model that a run trains: pretrained weights in the precision's dtype, adapters, checkpointing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from vramplan.errors import ConfigError, SpecError
from vramplan.measure.run_dir import RunDir
from vramplan.rank.model import add_adapters, apply_kernels, checkpoint_layers, weight_dtype
from vramplan.retain.expand import expand_model_directory
from vramplan.retain.freeze import freeze
from vramplan.spec.run import RunSpec
from vramplan.spec.trainable import FullMethod
from vramplan.train.export import replaced_directory
from vramplan.train.pretrained import why_not_read
from vramplan.train.seeds import seed_initial_weights


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """``module`` as DeepSpeed takes it; ``zero3`` must live as long as models are made (transformers looks for it)."""

    module: Any
    zero3: object | None


def load_model(run: RunSpec, directory: Path, config: dict[str, Any]) -> LoadedModel:
    """Loads weights and adds what the run asks; under ZeRO-3 each rank keeps only its share of each weight.

    Raises:
        ConfigError: transformers cannot build the model.
    """
    zero3 = _announce_zero3(run, config)
    module = pretrained(run, directory)
    module.config.use_cache = False
    if isinstance(run.method, FullMethod):
        if run.method.freezes:
            freeze(module, run.method)
    else:
        seed_initial_weights(run.training.seed)
        module = add_adapters(module, run.method)
    if run.activation_checkpointing == "full":
        checkpoint_layers(module, run)
    apply_kernels(module, run)
    return LoadedModel(module, zero3)


def start_directory(run: RunSpec, directory: Path, run_dir: RunDir, rank: int) -> Path:
    """The model that training starts from: the base, or a copy of it with new blocks, made once; every rank calls.

    Raises:
        ConfigError: the family's blocks are not known.
    """
    if not run.new_blocks:
        return directory
    target = run_dir.root / "expanded"
    if rank == 0 and not target.exists():
        with replaced_directory(target) as temporary:
            expand_model_directory(directory, temporary, run.new_blocks)
    dist.barrier()
    return target


def check_fit_of_tokenizer(run: RunSpec, config: Any, tokenizer: Any) -> None:
    """Raises:
    ConfigError: the tokenizer makes ids that the embedding does not hold.
    SpecError: sequences are longer than the model's positions.
    """
    text = config.get_text_config()
    if len(tokenizer) > text.vocab_size:
        raise ConfigError(
            f"the tokenizer of {run.model} has {len(tokenizer)} tokens but the model's embedding only "
            f"{text.vocab_size} rows: give the tokenizer that belongs to the model, or resize the embedding first"
        )
    positions = getattr(text, "max_position_embeddings", None)
    if positions is not None and run.seq_len > positions:
        raise SpecError(f"seq_len {run.seq_len} is longer than the {positions} positions of {run.model}: lower seq_len")


def count_parameters(module: torch.nn.Module) -> tuple[int, int]:
    """(all, trained) parameters of the whole model, whatever of it this rank holds."""
    sizes = [(getattr(param, "ds_numel", param.numel()), param.requires_grad) for param in module.parameters()]
    return sum(numel for numel, _ in sizes), sum(numel for numel, trained in sizes if trained)


def pretrained(run: RunSpec, directory: Path) -> Any:
    """The model of a directory in the precision's dtype; inside ZeRO-3's context each rank gets its share.

    Raises:
        ConfigError: transformers cannot load it.
    """
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=weight_dtype(run),
            attn_implementation=run.attention,
            use_safetensors=None if run.training.allow_pickle else True,
            trust_remote_code=run.training.trust_remote_code,
            **_quantized(run),
        )
        _keep_packing(model)
        return model
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(
            f"{directory}: cannot be loaded as a causal language model ({why_not_read(error)})"
        ) from error


def _keep_packing(model: torch.nn.Module) -> None:
    """On the CPU bitsandbytes packs 4-bit weights anew for inference as soon as a module evaluates, in a form that
    does not train (bitsandbytes/nn/modules.py, ``Linear4bit.forward``); a run evaluates and then goes on."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def _quantized(run: RunSpec) -> dict[str, Any]:
    """QLoRA's 4-bit weights: NormalFloat, scales quantized again (Dettmers et al. 2023, arXiv 2305.14314). Where ZeRO-3
    splits them the packed bits lie as elements of the weights' format, so that all that it gathers is of one."""
    if run.method.kind != "qlora":
        return {}
    import importlib.util

    if importlib.util.find_spec("bitsandbytes") is None:
        raise SpecError("method.kind: qlora needs bitsandbytes: pip install 'vramplan[qlora]', or use lora")
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=weight_dtype(run),
        bnb_4bit_quant_storage=weight_dtype(run) if run.zero.stage == 3 else None,
    )
    return {"quantization_config": config}


def _announce_zero3(run: RunSpec, config: dict[str, Any]) -> object | None:
    if run.zero.stage != 3:
        return None
    from transformers.integrations import HfDeepSpeedConfig

    # from_pretrained builds inside deepspeed.zero.Init while an object like this one lives
    announced: object = HfDeepSpeedConfig(config)
    return announced
