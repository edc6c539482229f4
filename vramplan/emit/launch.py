"""How the ranks of a run are started: DeepSpeed's launcher, or torchrun's, as a command and its environment."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from vramplan.facts.device import Node
from vramplan.spec.run import RunSpec

TRAINER_MODULE = "vramplan.train"
"""What runs on each rank: ``python -m vramplan.train PLAN RUN_DIR``."""
DEFAULT_PORT = 29500
_ALLOC_CONF = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
_SETTING = re.compile(r"(?:\[[^\]]*\]|[^,\[])+")
SUPERVISOR_VARIABLE = "VRAMPLAN_SUPERVISOR"
"""``process_identity`` of the process that started the launcher: a rank does not outlive it."""


def trainer_arguments(
    plan: Path | str, run_dir: Path | str, *, resume: bool = False, probe: bool = False, retry: bool = True
) -> list[str]:
    """Arguments of the trainer's module."""
    flags = (("--resume", resume), ("--probe", probe), ("--no-retry", not retry))
    return [str(plan), str(run_dir), *(flag for flag, is_set in flags if is_set)]


def launch_command(
    node: Node,
    plan: Path | str,
    run_dir: Path | str,
    *,
    resume: bool = False,
    probe: bool = False,
    retry: bool = True,
    port: int = DEFAULT_PORT,
    hostfile: Path | str | None = None,
    log_dir: Path | str | None = None,
    executable: Sequence[str] = ("deepspeed",),
) -> list[str]:
    """DeepSpeed's launcher for all ranks of ``node``; it reaches other machines by ssh through ``hostfile``.

    ``log_dir``: a file for each rank's output there, instead of all ranks' on the launcher's own.
    """
    command = [*executable, "--num_gpus", str(node.gpus_per_node)]
    if node.num_nodes > 1:
        command += ["--num_nodes", str(node.num_nodes), "--hostfile", str(hostfile or "hostfile")]
    command += ["--master_port", str(port), "--no_local_rank", "--module"]
    if log_dir is not None:
        command += ["--enable_each_rank_log", str(log_dir)]
    return [*command, TRAINER_MODULE, *trainer_arguments(plan, run_dir, resume=resume, probe=probe, retry=retry)]


def local_launcher() -> tuple[str, ...]:
    """DeepSpeed's launcher of this very Python, whether or not its ``bin`` is on the path."""
    return (sys.executable, "-m", "deepspeed.launcher.runner")


def torchrun_command(
    node: Node, plan: Path | str, run_dir: Path | str, *, resume: bool = False, port: int = DEFAULT_PORT
) -> list[str]:
    """The same start by torchrun, to be given on every node (``MASTER_ADDR`` names the first)."""
    command = ["torchrun", "--nproc-per-node", str(node.gpus_per_node)]
    if node.num_nodes == 1:
        command += ["--standalone"]
    else:
        endpoint = f"$MASTER_ADDR:{port}"
        command += ["--nnodes", str(node.num_nodes), "--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint]
    return [*command, "--module", TRAINER_MODULE, *trainer_arguments(plan, run_dir, resume=resume)]


def launch_environment(run: RunSpec, node: Node, inherited: Mapping[str, str] | None = None) -> dict[str, str]:
    """Variables that the launch sets on top of ``inherited`` (this process's own); one that is set there stays, but of
    the allocator's settings those that the plan has, which its bytes and a recovery rely on."""
    inherited = os.environ if inherited is None else inherited
    # DeepSpeed knows AMD's GPUs as cuda (accelerator/real_accelerator.py)
    wanted: dict[str, str] = {
        "DS_ACCELERATOR": "cuda" if node.device.kind == "rocm" else node.device.kind,
        # `python -m` would look for modules in the working directory first: a folder of data may have a module's name
        "PYTHONSAFEPATH": "1",
    }
    if node.device.kind == "cpu":
        # without it each rank starts a thread a core, and the ranks share the cores
        wanted["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // node.gpus_per_node))
    variables = {name: value for name, value in wanted.items() if name not in inherited}
    if run.alloc_conf:
        # the first of these that is set is the only one that torch reads (c10/cuda/CUDAAllocatorConfig.h:136-147)
        set_there = next((inherited[name] for name in _ALLOC_CONF if name in inherited), "")
        variables[_ALLOC_CONF[0]] = _with_settings(set_there, run.alloc_conf)
    return variables


def _with_settings(before: str, settings: str) -> str:
    """An allocator's configuration with some settings (``key:value``, a value may be a list in brackets) replaced."""
    new = _SETTING.findall(settings)
    names = {each.partition(":")[0] for each in new}
    return ",".join([each for each in _SETTING.findall(before) if each.partition(":")[0] not in names] + new)


def shell_text(command: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
    """The command as one line for a shell, its variables in front (``$NAME`` is left for the shell to fill in)."""
    assignments = [f"{name}={shlex.quote(value)}" for name, value in (environment or {}).items()]
    words = [word if word.startswith("$") else shlex.quote(word) for word in command]
    return " ".join([*assignments, *words])


def process_identity(pid: int) -> str | None:
    """``pid:start time`` of a living process, by which it is not mistaken for a later one of the same id."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except OSError:
        return None
    # field 22 of proc(5), start time in clock ticks after boot; field 2, the name, may hold spaces and brackets
    return f"{pid}:{text.rpartition(')')[2].split()[19]}"
