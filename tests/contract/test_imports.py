"""What may import what, and what importing costs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAVY = {"torch", "transformers", "deepspeed", "peft", "datasets", "accelerate", "huggingface_hub"}
COLD_START_FACTOR = 3
"""Runs of several models came to between 1.6 and 2.6 on a machine with two cores."""


def modules_after(statement: str) -> set[str]:
    """Top-level names in sys.modules of a fresh interpreter after running the statement."""
    code = f"import sys, json\n{statement}\njson.dump(sorted(sys.modules), sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(json.loads(done.stderr))


def test_layers_and_fences_hold():
    command = [Path(sys.executable).parent / "lint-imports", "--no-cache"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


@pytest.mark.parametrize("package", ["vramplan", "vramplan.recovery"])
def test_importing_the_package_imports_no_training_stack(package: str):
    assert not modules_after(f"import {package}") & HEAVY


@pytest.mark.parametrize(
    "arguments",
    [
        ["models", "llama", "--json"],
        ["gpus"],
        ["doctor"],
        ["--version"],
        ["--help"],
        ["fit", "meta-llama/Llama-3.1-8B", "--gpu", "h100-80gb", "--gpus", "8", "--json"],
    ],
    ids=" ".join,
)
def test_subcommands_import_no_training_stack(arguments: list[str]):
    run = "from vramplan.cli.app import main\n"
    run += f"try: main({arguments!r})\nexcept SystemExit as end: assert end.code in (None, 0, 1)"
    assert not modules_after(run) & HEAVY


def test_fit_starts_cold_in_a_blink():
    """Against the import of the libraries that it cannot do without, as machines differ in speed. Processor time, which
    a busy machine does not stretch; one thread, so it is the wall time of an idle one."""
    libraries = [sys.executable, "-c", "import pydantic.main, pydantic.types, typer.main, rich.console"]
    fit = [sys.executable, "-m", "vramplan", "fit", "meta-llama/Llama-3.1-8B", "--gpu", "h100-80gb", "--gpus", "8"]
    # in turn, as speed changes with time too; the first may write the bytecode, as an install does
    pairs = [(processor_seconds(libraries), processor_seconds(fit)) for _ in range(6)]
    floor, seconds = (min(each) for each in zip(*pairs, strict=True))
    assert seconds < COLD_START_FACTOR * floor


def processor_seconds(command: list[str]) -> float:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=ROOT, env=env) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.stderr is not None
        assert process.returncode in (0, 1), process.stderr.read()
    return usage.ru_utime + usage.ru_stime
