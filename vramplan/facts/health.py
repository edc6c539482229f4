"""What of an environment will hurt a run, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from vramplan.facts.environment import TESTED_VERSIONS, Environment
from vramplan.facts.nvml import LocalGpu
from vramplan.units import GIB, MIB, format_bytes

# DeepSpeed's own env_report warns below 512 MiB; NCCL's and gloo's segments of 8 ranks take more.
_SHM_ENOUGH = 1 * GIB
# An idle display or a driver's leftovers stay below this; more is another process.
_GPU_IDLE = 512 * MIB
_HOST_FREE_ENOUGH = 4 * GIB
_NEEDED_TO_TRAIN = ("torch", "transformers", "deepspeed", "peft", "safetensors")


class Level(Enum):
    """How much a finding hurts."""

    OK = "ok"
    HURTS = "hurts"
    """Slower, tighter or untested, but a run goes on."""
    BLOCKS = "blocks"
    """A run of some kind, which the text names, cannot start."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at: what it is, how it stands, and what to do if it hurts."""

    subject: str
    level: Level
    text: str
    advice: str = ""


def findings(environment: Environment) -> tuple[Finding, ...]:
    """Everything worth saying about this machine, in the order in which a run meets it."""
    return tuple(
        finding
        for look in (_packages, _gpus, _torch_and_gpus, _host, _shared_memory, _ops, _variables)
        for finding in look(environment)
    )


def _packages(environment: Environment) -> Iterator[Finding]:
    missing = [name for name in _NEEDED_TO_TRAIN if environment.versions.get(name) is None]
    if missing:
        text = f"not installed: {', '.join(missing)}; estimates and plans work, training does not"
        yield Finding("packages", Level.BLOCKS, text, "pip install 'vramplan[train]' -c constraints.txt")
    others = [
        f"{name} {version} (tested: {TESTED_VERSIONS[name]})"
        for name, version in environment.versions.items()
        if version is not None and version.partition("+")[0] != TESTED_VERSIONS[name]
    ]
    if others:
        text = f"other versions than tested: {', '.join(others)}; buffers and names may differ"
        yield Finding("packages", Level.HURTS, text, "pip install -c constraints.txt, or calibrate against a run")
    if not missing and not others:
        yield Finding("packages", Level.OK, "all at the tested versions")


def _gpus(environment: Environment) -> Iterator[Finding]:
    driver = environment.driver
    if driver is None or not driver.gpus:
        why = "no NVIDIA driver" if driver is None else "the driver shows no GPU"
        hidden = "CUDA_VISIBLE_DEVICES" in environment.variables
        advice = "unset CUDA_VISIBLE_DEVICES if GPUs should be seen" if hidden and driver is not None else ""
        yield Finding("GPUs", Level.HURTS, f"{why}; runs use the CPU: right, but slow", advice)
        return
    if len({(gpu.name, gpu.memory_bytes) for gpu in driver.gpus}) > 1:
        text = "GPUs differ; every rank is planned for the smallest"
        yield Finding("GPUs", Level.HURTS, text, "choose equal ones with CUDA_VISIBLE_DEVICES")
    for gpu in driver.gpus:
        yield _one_gpu(gpu)


def _one_gpu(gpu: LocalGpu) -> Finding:
    subject = f"GPU {gpu.index}"
    taken = gpu.usable_bytes - gpu.free_bytes
    offers = f"{gpu.name} offers {format_bytes(gpu.usable_bytes)} of {format_bytes(gpu.memory_bytes)}"
    if taken > _GPU_IDLE:
        text = f"{offers}, but {format_bytes(taken)} of it is taken by other processes"
        return Finding(subject, Level.HURTS, text, "end them, or plan with --memory-cap of what is left")
    if gpu.compute_capability < (8, 0):
        text = f"{offers}; compute capability {'.'.join(map(str, gpu.compute_capability))} has no bf16 units"
        return Finding(subject, Level.HURTS, text, "plan with --precision fp16")
    return Finding(subject, Level.OK, offers)


def _torch_and_gpus(environment: Environment) -> Iterator[Finding]:
    has_gpus = environment.driver is not None and bool(environment.driver.gpus)
    if not has_gpus or environment.versions.get("torch") is None:
        return
    if environment.torch_cuda is None:
        text = f"torch {environment.versions['torch']} is built without CUDA and will not see the GPUs"
        yield Finding("torch", Level.BLOCKS, text, "install a CUDA build of torch (see pytorch.org, Get Started)")
    else:
        yield Finding("torch", Level.OK, f"built for CUDA {environment.torch_cuda}")


def _host(environment: Environment) -> Iterator[Finding]:
    host = environment.host
    if host.memory_bytes is None:
        yield Finding("host memory", Level.HURTS, "this system does not say how much it has", "give --host-memory")
        return
    limited = host.memory_limit_bytes is not None and host.memory_limit_bytes < (host.memory_total_bytes or 0)
    text = f"{format_bytes(host.memory_bytes)} for this process"
    if limited:
        text += f" (control group's limit; the machine has {format_bytes(host.memory_total_bytes or 0)})"
    if host.memory_available_bytes is not None:
        text += f", {format_bytes(host.memory_available_bytes)} available on the machine"
        if host.memory_available_bytes < _HOST_FREE_ENOUGH:
            yield Finding("host memory", Level.HURTS, text, "free some before loading or offloading a model")
            return
    yield Finding("host memory", Level.OK, text)


def _shared_memory(environment: Environment) -> Iterator[Finding]:
    total, free = environment.host.shm_total_bytes, environment.host.shm_free_bytes
    if total is None or free is None:
        yield Finding(
            "/dev/shm", Level.HURTS, "there is none; ranks and data loaders of one machine share memory there"
        )
    elif free < _SHM_ENOUGH:
        text = f"{format_bytes(free)} free of {format_bytes(total)}: ranks and data loaders may fail with a bus error"
        yield Finding("/dev/shm", Level.HURTS, text, "in a container: --shm-size=8g (or --ipc=host)")
    else:
        yield Finding("/dev/shm", Level.OK, f"{format_bytes(free)} free of {format_bytes(total)}")


def _ops(environment: Environment) -> Iterator[Finding]:
    if environment.versions.get("deepspeed") is None:
        return
    ops = environment.ops
    built = f"prebuilt: {', '.join(ops.prebuilt)}" if ops.prebuilt else "none prebuilt"
    lacking = [name for name, path in (("a C++ compiler", ops.compiler), ("ninja", ops.ninja)) if path is None]
    has_gpus = environment.driver is not None and bool(environment.driver.gpus)
    if lacking and not {"fused_adam", "cpu_adam"} <= set(ops.prebuilt):
        text = f"{built}; {' and '.join(lacking)} not on the path: a run cannot compile FusedAdam and CPUAdam"
        advice = "apt install g++; pip install ninja; or optimizer.kind: adamw_torch"
        yield Finding("DeepSpeed ops", Level.BLOCKS, text, advice)
    elif has_gpus and "fused_adam" not in ops.prebuilt and ops.nvcc is None:
        text = f"{built}; no nvcc: FusedAdam cannot be compiled for the GPU"
        yield Finding(
            "DeepSpeed ops", Level.BLOCKS, text, "set CUDA_HOME to a CUDA toolkit, or optimizer.kind: adamw_torch_fused"
        )
    elif has_gpus and _other_cuda(ops.nvcc_version, environment.torch_cuda):
        text = f"nvcc is of CUDA {ops.nvcc_version}, torch of {environment.torch_cuda}: DeepSpeed refuses to compile"
        yield Finding(
            "DeepSpeed ops",
            Level.BLOCKS,
            text,
            "install the toolkit of torch's release, or optimizer.kind: adamw_torch_fused",
        )
    else:
        rest = "" if lacking else "; the rest is compiled when a run first needs it (about a minute)"
        yield Finding("DeepSpeed ops", Level.OK, built + rest)


def _other_cuda(nvcc_version: str | None, torch_cuda: str | None) -> bool:
    """Whether their major releases differ; DeepSpeed lets most minor ones pass (op_builder/builder.py)."""
    return (
        nvcc_version is not None and torch_cuda is not None and nvcc_version.split(".")[0] != torch_cuda.split(".")[0]
    )


def _variables(environment: Environment) -> Iterator[Finding]:
    has_gpus = environment.driver is not None and bool(environment.driver.gpus)
    set_to = environment.variables
    if has_gpus and set_to.get("DS_ACCELERATOR") == "cpu":
        yield Finding(
            "DS_ACCELERATOR", Level.HURTS, "is cpu: DeepSpeed will leave the GPUs idle", "unset DS_ACCELERATOR"
        )
    for name in ("NCCL_P2P_DISABLE", "NCCL_SHM_DISABLE"):
        if has_gpus and set_to.get(name) == "1":
            yield Finding(name, Level.HURTS, "is 1: ranks of one machine talk through slower paths", f"unset {name}")
    for name, value in sorted(set_to.items()):
        yield Finding("environment", Level.OK, f"{name}={value}")
