"""Model families: from the fields of a ``config.json`` to an Architecture, one file a family.

Every family file has one function ``build(fields: Fields) -> Architecture``. Nothing of a model directory is executed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import cast

from vramplan.errors import ConfigError, UnknownNameError
from vramplan.facts.architecture import Architecture
from vramplan.facts.dtype import Dtype
from vramplan.facts.families.consistent import check_config
from vramplan.facts.families.fields import Fields

FAMILIES: dict[str, str] = {
    "bloom": "bloom",
    "cohere": "cohere",
    "deepseek_v2": "deepseek_v2",
    "deepseek_v3": "deepseek_v3",
    "falcon": "falcon",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3": "gemma3",
    "gemma3_text": "gemma3",
    "glm": "glm",
    "gpt2": "gpt2",
    "gpt_neox": "gpt_neox",
    "gpt_oss": "gpt_oss",
    "granite": "granite",
    "llama": "llama",
    "llama4": "llama4",
    "llama4_text": "llama4",
    "mistral": "mistral",
    "mixtral": "mixtral",
    "olmo": "olmo",
    "olmo2": "olmo2",
    "opt": "opt",
    "phi": "phi",
    "phi3": "phi3",
    "qwen2": "qwen2",
    "qwen2_moe": "qwen2_moe",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3_moe",
    "smollm3": "smollm3",
    "stablelm": "stablelm",
    "starcoder2": "starcoder2",
}
"""``model_type`` of a ``config.json`` -> module of this package that reads it."""

REMOTE_CODE_FAMILIES = frozenset({"baichuan", "chatglm", "internlm2"})
"""Known model types whose code comes with the model and is in no transformers release."""


def architecture_from_config(config: Mapping[str, object]) -> Architecture:
    """The blocks of the model that transformers 5.17 would build from these fields.

    Raises:
        UnknownNameError: no family file reads this ``model_type``.
        ConfigError: a field is missing, of the wrong kind or contradicts another; or the model runs its own code.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise ConfigError(f"config.json has no field 'model_type' (known: {', '.join(sorted(FAMILIES))})")
    module_name = FAMILIES.get(model_type)
    if module_name is None:
        raise _unknown_family(model_type, config)
    module = importlib.import_module(f"{__name__}.{module_name}")
    build = cast(Callable[[Fields], Architecture], module.build)
    fields = Fields(_text_config(config, module_name), module_name)
    architecture = build(fields)
    check_config(fields, architecture)
    return replace(
        architecture, stored_dtype=_stored_dtype(config), stored_quantization=_stored_quantization(config, module_name)
    )


def _stored_dtype(config: Mapping[str, object]) -> Dtype | None:
    name = config.get("dtype") or config.get("torch_dtype")
    return {"float32": Dtype.FP32, "bfloat16": Dtype.BF16, "float16": Dtype.FP16}.get(str(name).removeprefix("torch."))


def _stored_quantization(config: Mapping[str, object], module_name: str) -> str:
    """transformers/quantizers/auto.py, ``get_hf_quantizer`` and ``supports_quant_method``: that of the language model's
    part stands in for none; bitsandbytes' flags decide, and without either it packs nothing."""
    section = Fields(config, module_name).section("quantization_config")
    if section is None:
        section = Fields(_text_config(config, module_name), module_name).section("quantization_config")
    if not section:
        return ""
    if section.get("load_in_8bit"):
        return "bitsandbytes, 8 bits"
    if section.get("load_in_4bit"):
        return "bitsandbytes"
    method = Fields(section, module_name).text("quant_method", default="an unnamed method")
    return "" if method == "bitsandbytes" else method


def _text_config(config: Mapping[str, object], module_name: str) -> Mapping[str, object]:
    """The language model's part where the file describes a model for images too (``gemma3``, ``llama4``)."""
    if "text_config" not in config and "vision_config" not in config:
        return config
    section = Fields(config, module_name).section("text_config")
    if section is None:
        raise Fields(config, module_name).error("text_config", "is missing")
    return section


def _unknown_family(model_type: str, config: Mapping[str, object]) -> ConfigError | UnknownNameError:
    if "auto_map" in config or model_type in REMOTE_CODE_FAMILIES:
        return ConfigError(
            f"model type {model_type!r} is defined by code in the model's own directory, which is never run to read "
            "facts: `vramplan simulate --trust-remote-code` runs it and counts its bytes, or describe it as a model of "
            "a known family with model_config_fields"
        )
    return UnknownNameError("model family", model_type, FAMILIES, hint="(see vramplan/facts/families/)")
