"""The README is true: its commands run as they stand there, its Python runs, and its tables are what is printed.

The commands that need a finished run of some minutes are those of `scripts/demo`, which runs them for real.
"""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)
LINES = [line for language, text in BLOCKS if not language for line in text.splitlines()]
COMMANDS = list(dict.fromkeys(line.removeprefix("$ ") for line in LINES if re.match(r"(\$ )?vramplan ", line)))
AFTER_TRAINING = ("vramplan train ", "vramplan compare demo-out/run/")
"""They need minutes; `scripts/demo` has them."""
SLOW = ("vramplan bench ",)
"""They train a small model for two steps, in order."""


def is_quick(command):
    return not command.startswith(AFTER_TRAINING + SLOW)


def run(command, out):
    words = shlex.split(command.replace("demo-out", str(out)))
    assert (BIN / words[0]).exists()
    done = subprocess.run([BIN / words[0], *words[1:]], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("command", [command for command in COMMANDS if is_quick(command)])
def test_quick_command(command, tmp_path):
    assert run(command, tmp_path).strip()


def test_commands_that_measure(tmp_path):
    commands = [command for command in COMMANDS if command.startswith(SLOW)]
    assert len(commands) == 2
    for command in commands:
        printed = run(command, tmp_path)
    assert "modeling_qwen2.py" in printed


def test_the_demo_runs_the_commands_that_train():
    demo = (ROOT / "scripts/demo").read_text(encoding="utf-8").replace("$out", "demo-out").replace('"', "")
    demo = demo.replace("$record", "demo-out/run/record.jsonl")
    trained = [command for command in COMMANDS if command.startswith(AFTER_TRAINING)]
    assert len(trained) == 2
    for command in trained:
        assert f"show {command}\n" in demo


def test_make_has_the_targets_that_it_names():
    targets = re.findall(r"^make (\w+)", "\n".join(LINES), flags=re.MULTILINE)
    assert targets == ["demo", "test"]
    for target in targets:
        done = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True)
        assert f"scripts/{target}" in done.stdout


def test_python(tmp_path):
    (code,) = [text for language, text in BLOCKS if language == "python"]
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "plan.yaml").exists()


def test_the_table_of_fit_is_what_it_prints(tmp_path):
    (shown,) = [text for _, text in BLOCKS if text.startswith("$ vramplan fit ")]
    command, _, table = shown.partition("\n")
    assert plain(table) in plain(run(command.removeprefix("$ "), tmp_path)), "paste what the command prints"


def test_the_accuracy_is_what_compare_prints(tmp_path):
    (stated,) = [line for line in LINES if "records compared:" in line]
    printed = run("vramplan compare tests/golden/cpu_records.jsonl", tmp_path)
    assert stated in printed.splitlines(), "paste the summary that the command prints"


def plain(text):
    """Without the blanks that pad a table's last column."""
    return "\n".join(line.rstrip() for line in text.strip().splitlines())
