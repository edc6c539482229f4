"""The directory that ``vramplan plan`` writes: everything needed to start the run, and why it is as it is."""

from __future__ import annotations

import json
import platform
from importlib import metadata
from pathlib import Path

from vramplan import __version__
from vramplan.emit.deepspeed import ds_config
from vramplan.emit.launch import launch_command, launch_environment, shell_text
from vramplan.errors import SpecError
from vramplan.report import words
from vramplan.search.plan import Plan
from vramplan.units import format_bytes, format_count, format_seconds

_TRAINING_PACKAGES = ("torch", "transformers", "deepspeed", "peft", "accelerate")


def installed_versions() -> dict[str, str]:
    """Versions of vramplan, Python and what is installed to train with; read from metadata, nothing is imported."""
    versions = {"vramplan": __version__, "python": platform.python_version()}
    for package in _TRAINING_PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue  # a plan may be made on a machine that does not train
    return versions


def write_plan_dir(plan: Plan, directory: Path) -> list[Path]:
    """Writes plan.yaml, ds_config.json, launch.sh and refused.md; the paths in that order.

    Raises:
        SpecError: the directory cannot be written.
    """
    texts = {
        "ds_config.json": json.dumps(ds_config(plan.run, plan.node.world_size), indent=2) + "\n",
        "launch.sh": _launch_script(plan),
        "refused.md": refused_markdown(plan),
    }
    try:
        directory.mkdir(parents=True, exist_ok=True)
        plan.save(directory / "plan.yaml")
        for name, text in texts.items():
            (directory / name).write_text(text, encoding="utf-8")
        (directory / "launch.sh").chmod(0o755)
    except OSError as error:
        raise SpecError(f"{directory}: cannot be written ({error.strerror}); choose another -o") from error
    return [directory / "plan.yaml", *(directory / name for name in texts)]


def _launch_script(plan: Plan) -> str:
    """Starts the ranks as ``vramplan train`` does, but without its recovery; takes the run directory as argument."""
    command = launch_command(plan.node, "$PLAN", "$RUN_DIR")
    environment = launch_environment(plan.run, plan.node, inherited={})
    line = shell_text(command, environment).replace("$PLAN", '"$PLAN"').replace("$RUN_DIR", '"$RUN_DIR"')
    return (
        "#!/bin/sh\n"
        "# `vramplan train plan.yaml` does the same, shows progress and writes the record.\n"
        "set -eu\n"
        'HERE=$(cd "$(dirname "$0")" && pwd)\n'
        'PLAN="$HERE/plan.yaml"\n'
        'RUN_DIR="${1:-$HERE/run}"\n'
        f"exec env {line}\n"
    )


def refused_markdown(plan: Plan) -> str:
    """A table of the candidates that looked better, with the reason against each."""
    prediction = plan.prediction
    lines = [
        f"# {words.describe_run(plan.run)}",
        "",
        f"On {words.describe_node(plan.node)}. Chosen: {words.describe_layout(plan.run)}; "
        f"{format_bytes(prediction.used_peak_bytes)} used of {format_bytes(prediction.capacity_bytes)} "
        f"at its peak ({prediction.peak_moment}), {format_seconds(prediction.step_time_s)} a step.",
        "",
    ]
    if not plan.refused:
        return "\n".join([*lines, "No candidate looked better.", ""])
    lines += [
        "Every candidate that looked better, the best first: faster, or as fast and simpler. Step times rank; they "
        "rest on assumed efficiencies.",
        "",
        "| candidate | a step | tokens/s | why not |",
        "| --- | ---: | ---: | --- |",
    ]
    lines += [
        f"| {refusal.candidate.label()} | {format_seconds(refusal.step_time_s)} | "
        f"{format_count(int(refusal.tokens_per_s))} | {refusal.reason} |"
        for refusal in plan.refused
    ]
    return "\n".join([*lines, ""])
