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
COLD_START_S = 0.5


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
    """Processor time, which a busy machine does not stretch; one thread, so it is the wall time of an idle one."""
    command = [sys.executable, "-m", "vramplan", "fit", "meta-llama/Llama-3.1-8B", "--gpu", "h100-80gb", "--gpus", "8"]
    seconds = [processor_seconds(command) for _ in range(6)]  # the first may write the bytecode, as an install does
    assert min(seconds) < COLD_START_S


def processor_seconds(command: list[str]) -> float:
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=ROOT) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.stderr is not None
        assert process.returncode in (0, 1), process.stderr.read()
    return usage.ru_utime + usage.ru_stime
