"""What is installed on this machine, read without importing any of it."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vramplan.facts.host import Host, read_host
from vramplan.facts.nvml import NvidiaDriver, read_driver
from vramplan.forkserver import path_with_own_bin

TESTED_VERSIONS: dict[str, str] = {
    "torch": "2.13.0",
    "transformers": "5.17.0",
    "deepspeed": "0.19.8",
    "accelerate": "1.15.0",
    "peft": "0.21.2",
    "datasets": "5.2.0",
    "safetensors": "0.8.0",
    "tensorboard": "2.21.0",
    "psutil": "7.2.2",
}
"""Versions that the numbers and the trainer were tested with; ``constraints.txt`` pins the same."""

WATCHED_VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "CUDA_HOME",
    "DS_ACCELERATOR",
    "HF_HOME",
    "HF_HUB_OFFLINE",
    "NCCL_P2P_DISABLE",
    "NCCL_SHM_DISABLE",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "TORCH_EXTENSIONS_DIR",
)
"""Environment variables that change memory, devices or where things are compiled."""


@dataclass(frozen=True, slots=True)
class DeepSpeedOps:
    """What DeepSpeed has compiled, and what it needs to compile the rest when a run starts."""

    prebuilt: tuple[str, ...]
    compiler: str | None
    ninja: str | None
    nvcc: str | None
    nvcc_version: str | None
    """CUDA release of nvcc, such as ``13.0``."""


@dataclass(frozen=True, slots=True)
class Environment:
    """This machine as a training run would find it."""

    python_version: str
    versions: Mapping[str, str | None]
    """Package -> installed version, None where it is not installed; the packages of ``TESTED_VERSIONS``."""
    torch_cuda: str | None
    """CUDA release that torch was built for; None for a build without CUDA, or without torch."""
    driver: NvidiaDriver | None
    host: Host
    ops: DeepSpeedOps
    variables: Mapping[str, str]
    """Those of ``WATCHED_VARIABLES`` that are set."""


def read_environment() -> Environment:
    """Read this machine: package metadata, NVML, ``/proc``, the compilers on the path."""
    return Environment(
        python_version=platform.python_version(),
        versions={package: _installed_version(package) for package in TESTED_VERSIONS},
        torch_cuda=_module_constant("torch", "version.py", "cuda"),
        driver=read_driver(),
        host=read_host(),
        ops=_read_ops(),
        variables={name: os.environ[name] for name in WATCHED_VARIABLES if name in os.environ},
    )


def _installed_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _read_ops() -> DeepSpeedOps:
    installed = ast.literal_eval(
        _module_constant("deepspeed", "git_version_info_installed.py", "installed_ops") or "{}"
    )
    compiler = os.environ.get("CXX") or "c++"  # torch.utils.cpp_extension.get_cxx_compiler
    nvcc = _find_nvcc()
    return DeepSpeedOps(
        prebuilt=tuple(sorted(name for name, built in installed.items() if built)),
        compiler=shutil.which(compiler),
        ninja=shutil.which("ninja", path=path_with_own_bin()),  # as the processes of a run look for it
        nvcc=nvcc,
        nvcc_version=_nvcc_version(nvcc) if nvcc else None,
    )


def _find_nvcc() -> str | None:
    """nvcc where torch looks for it: CUDA_HOME, the path, ``/usr/local/cuda`` (torch.utils.cpp_extension)."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [f"{home}/bin/nvcc"] if home else ["nvcc", "/usr/local/cuda/bin/nvcc"]
    return next(filter(None, map(shutil.which, candidates)), None)


def _nvcc_version(nvcc: str) -> str | None:
    try:
        text = subprocess.run([nvcc, "-V"], capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None  # as DeepSpeed: an nvcc that does not run is none
    found = re.search(r"release (\d+\.\d+)", text)
    return found.group(1) if found else None


def _module_constant(package: str, file_name: str, constant: str) -> str | None:
    """A constant's value out of an installed package's source, as text; None where there is none or it is None."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / file_name
    if not path.is_file():
        return None
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        named = any(isinstance(target, ast.Name) and target.id == constant for target in targets)
        if named and isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            value = ast.literal_eval(node.value)
            return None if value is None else str(value)
    return None
