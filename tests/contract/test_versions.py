"""One set of tested versions, wherever it is written."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from vramplan.facts.environment import TESTED_VERSIONS

ROOT = Path(__file__).resolve().parents[2]


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line)


def test_doctor_and_constraints_agree():
    constraints = pins()
    assert {name: constraints[name] for name in TESTED_VERSIONS} == TESTED_VERSIONS


def test_every_dependency_is_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [
        *project["dependencies"],
        *(item for extra in project["optional-dependencies"].values() for item in extra),
    ]
    names = {re.split(r"[\[<>=~! ]", item)[0] for item in wanted} - {"vramplan"}
    pinned = {name.lower().replace("_", "-") for name in pins()}
    assert not {name for name in names if name.lower().replace("_", "-") not in pinned}


def test_committed_files_name_no_local_path_or_package_mirror():
    constraints = (ROOT / "constraints.txt").read_text()
    assert "@" not in constraints
    assert "/" not in constraints
