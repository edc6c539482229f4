"""``vramplan doctor``: this machine, and what of it will hurt."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.text import Text

from vramplan.cli import tables
from vramplan.facts.environment import TESTED_VERSIONS, Environment, read_environment
from vramplan.facts.health import Finding, Level, findings
from vramplan.version import __version__

_STYLES = {Level.OK: "green", Level.HURTS: "yellow", Level.BLOCKS: "bold red"}


def doctor(json: Annotated[bool, typer.Option("--json", help="Print one object.")] = False) -> None:
    """Check this machine: versions, GPUs, memory, DeepSpeed, and what will hurt."""
    environment = read_environment()
    found = findings(environment)
    if json:
        tables.print_json(_as_object(environment, found))
        return
    typer.echo(f"vramplan {__version__}, Python {environment.python_version}")
    _print_versions(environment)
    _print_findings(found)


def _print_versions(environment: Environment) -> None:
    table = tables.make_table("package", "installed", "tested")
    for package, tested in TESTED_VERSIONS.items():
        table.add_row(package, environment.versions[package] or "-", tested)
    tables.print_table(table)


def _print_findings(found: tuple[Finding, ...]) -> None:
    table = tables.make_table("what", "state", "seen", "what to do")
    for finding in found:
        state = Text(finding.level.value, style=_STYLES[finding.level])
        table.add_row(finding.subject, state, finding.text, finding.advice)
    tables.print_table(table)
    hurting = [finding for finding in found if finding.level is not Level.OK]
    blocking = sum(finding.level is Level.BLOCKS for finding in hurting)
    tables.print_note(
        f"{len(hurting)} of {len(found)} points will hurt, {blocking} of them block a run."
        if hurting
        else "Nothing will hurt."
    )


def _as_object(environment: Environment, found: tuple[Finding, ...]) -> dict[str, Any]:
    driver, host, ops = environment.driver, environment.host, environment.ops
    return {
        "vramplan": __version__,
        "python": environment.python_version,
        "versions": dict(environment.versions),
        "tested_versions": TESTED_VERSIONS,
        "torch_cuda": environment.torch_cuda,
        "driver": driver.version if driver else None,
        "gpus": [
            {
                "index": gpu.index,
                "name": gpu.name,
                "memory_bytes": gpu.memory_bytes,
                "usable_bytes": gpu.usable_bytes,
                "free_bytes": gpu.free_bytes,
                "compute_capability": ".".join(map(str, gpu.compute_capability)),
            }
            for gpu in (driver.gpus if driver else ())
        ],
        "host": {
            "memory_bytes": host.memory_bytes,
            "memory_available_bytes": host.memory_available_bytes,
            "memory_limit_bytes": host.memory_limit_bytes,
            "shm_total_bytes": host.shm_total_bytes,
            "shm_free_bytes": host.shm_free_bytes,
            "num_cpus": host.num_cpus,
        },
        "deepspeed_ops": {
            "prebuilt": list(ops.prebuilt),
            "compiler": ops.compiler,
            "ninja": ops.ninja,
            "nvcc": ops.nvcc,
            "nvcc_version": ops.nvcc_version,
        },
        "variables": dict(environment.variables),
        "findings": [
            {"subject": item.subject, "level": item.level.value, "text": item.text, "advice": item.advice}
            for item in found
        ],
    }
