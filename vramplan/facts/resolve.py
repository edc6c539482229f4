"""From the name in a spec to an architecture: fields given in place, a directory, the catalogue, the hub."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from vramplan.errors import ConfigError, UnknownNameError
from vramplan.facts.architecture import Architecture
from vramplan.facts.catalogue import all_models, find_model
from vramplan.facts.expansion import expand_architecture
from vramplan.facts.families import architecture_from_config


class ModelRequest(Protocol):
    """What is read of a spec (``vramplan.spec.run.RunSpec`` is one)."""

    @property
    def model(self) -> str: ...
    @property
    def model_config_fields(self) -> Mapping[str, Any] | None: ...
    @property
    def new_blocks(self) -> int: ...


def resolve_architecture(run: ModelRequest) -> Architecture:
    """The blocks of the model that a run names.

    Raises:
        UnknownNameError: nothing known has that name, or its family is unknown.
        ConfigError: its ``config.json`` cannot be read as that of its family.
    """
    config = resolve_config(run)
    try:
        architecture = architecture_from_config(config)
    except ConfigError as error:
        if run.model_config_fields is None:
            raise
        raise ConfigError(
            f"model_config_fields replaces config.json as a whole, so it must hold all that is read of one: {error}"
        ) from error
    return expand_architecture(architecture, run.new_blocks)


def resolve_config(run: ModelRequest) -> Mapping[str, Any]:
    """The ``config.json`` fields of the model that a run names: those given in place, else a local directory's, else
    the catalogue's, else the hub cache's, else the hub's (if ``huggingface_hub`` is installed and reaches it)."""
    if run.model_config_fields is not None:
        return run.model_config_fields
    directory = Path(run.model).expanduser()
    if directory.is_dir():
        return read_config(directory / "config.json")
    try:
        return find_model(run.model).config
    except UnknownNameError:
        path = _cached_config(run.model) or _downloaded_config(run.model)
        if path is None:
            raise
        return read_config(path)


def read_config(path: Path) -> Mapping[str, Any]:
    """The fields of one ``config.json``, as data.

    Raises:
        ConfigError: there is no such file, or it holds no JSON object.
    """
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path.parent} has no config.json; a model directory needs one") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ConfigError(f"{path} holds {type(fields).__name__} where an object of fields is expected")
    return fields


def _cached_config(model: str) -> Path | None:
    """``config.json`` of a hub id in the local hub cache (``models--owner--name/snapshots/<revision>/``)."""
    snapshots = _hub_cache() / f"models--{model.replace('/', '--')}" / "snapshots"
    found = sorted(snapshots.glob("*/config.json"), key=lambda path: path.stat().st_mtime)
    return found[-1] if found else None


def _hub_cache() -> Path:
    """Where ``huggingface_hub`` keeps downloads (its ``constants.py``)."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()


def _downloaded_config(model: str) -> Path | None:
    """``config.json`` of a hub id fetched from the hub; None where nothing is fetched (offline, no client, no hub id).

    Raises:
        UnknownNameError: the hub did not give it; the text says why.
    """
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    if model.count("/") != 1 or offline or importlib.util.find_spec("huggingface_hub") is None:
        return None
    if not _hub_is_reachable():
        raise _not_from_hub(model, "no connection")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(model, "config.json"))
    except Exception as error:  # the hub's client raises its own errors and those of its HTTP library
        raise _not_from_hub(model, str(error).splitlines()[0] if str(error) else type(error).__name__) from error


def _hub_is_reachable(timeout_s: float = 3.0) -> bool:
    """Whether the hub's host takes a connection. The hub's client itself retries for half a minute first.

    Behind a proxy the question cannot be asked so cheaply and the client decides.
    """
    import socket  # with urllib, milliseconds that a model of the catalogue need not wait for
    from urllib.parse import urlsplit

    if any(os.environ.get(name) for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")):
        return True
    endpoint = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    port = endpoint.port or (80 if endpoint.scheme == "http" else 443)
    try:
        with socket.create_connection((endpoint.hostname or "", port), timeout=timeout_s):
            return True
    except OSError:
        return False


def _not_from_hub(model: str, reason: str) -> UnknownNameError:
    hint = f"(the model hub did not give it: {reason}; a local directory with a config.json works too)"
    return UnknownNameError("model", model, (entry.name for entry in all_models()), hint=hint)
