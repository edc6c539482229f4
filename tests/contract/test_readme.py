"""Every command of the README runs as it stands there; the two that train are run by `scripts/demo`."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
BLOCKS = re.findall(r"```\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
COMMANDS = sorted(
    {line.removeprefix("$ ") for block in BLOCKS for line in block.splitlines() if re.match(r"(\$ )?vramplan ", line)}
)
OF_THE_DEMO = ("vramplan train ", "vramplan compare ")
"""They need a finished run of some minutes."""


@pytest.mark.parametrize("command", [each for each in COMMANDS if not each.startswith(OF_THE_DEMO)])
def test_readme_command(command, tmp_path):
    words = shlex.split(command.replace("demo-out", str(tmp_path)))
    done = subprocess.run([BIN / words[0], *words[1:]], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_the_commands_that_train_are_those_of_the_demo():
    demo = (ROOT / "scripts/demo").read_text()
    trained = [each for each in COMMANDS if each.startswith(OF_THE_DEMO)]
    assert trained
    for command in trained:
        assert shlex.split(command)[1] in demo
