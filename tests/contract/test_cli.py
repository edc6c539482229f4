"""The command line as a process: exit codes, one-sentence errors, no traceback."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

from vramplan.cli.app import SUBCOMMANDS
from vramplan.version import __version__

ROOT = Path(__file__).resolve().parents[2]


def vramplan(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vramplan", *arguments], capture_output=True, text=True, check=False, cwd=ROOT
    )


@pytest.mark.parametrize("subcommand", SUBCOMMANDS, ids=lambda subcommand: subcommand.name)
def test_every_subcommand_of_the_table_exists_and_has_help(subcommand):
    function = subcommand.load()
    assert inspect.signature(function).parameters
    done = vramplan(subcommand.name, "--help")
    assert done.returncode == 0, done.stderr
    assert subcommand.help.split(".")[0][:30] in done.stdout.replace("\n", " ")


def test_help_lists_every_subcommand():
    shown = vramplan("--help").stdout
    assert all(subcommand.name in shown for subcommand in SUBCOMMANDS)


def test_version():
    assert vramplan("--version").stdout == f"vramplan {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["models", "llama3.1-8b"], "Llama-3.1-8B"),
        (["gpus", "h1oo"], "H100"),
        (["fit", "no/such-model", "--gpu", "h100"], "unknown model 'no/such-model'"),
        (["fit", "llama-3.1-8b", "--gpu", "a100"], "A100-SXM4-40GB"),
        (["fit", "llama-3.1-8b", "--gpu", "h1oo"], "H100"),
        (["models", "--jsn"], "--json"),
        (["nonsense"], "nonsense"),
    ],
)
def test_what_a_user_can_mend_exits_2_with_one_clear_text(arguments, said):
    done = vramplan(*arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
