"""What earlier runs of this user on this machine learnt: which plan ran out of memory, and which then went on.

One line of JSON each in ``$XDG_STATE_HOME/vramplan/learnt.jsonl`` (``~/.local/state``). A line counts only for the same
plan on the same machine with the same versions; deleting the file forgets all.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vramplan.measure.run_dir import append_line
from vramplan.search.plan import Plan, plan_id


@dataclass(frozen=True, slots=True)
class Lesson:
    """A plan that ran out of memory, and what of it was changed until the run went through."""

    plan: str
    """``plan_id`` of the plan that did not fit."""
    changes: Mapping[str, Any]
    cause: str
    phase: str
    machine: str
    versions: Mapping[str, str]
    time: float = 0.0


def learnt_path() -> Path:
    """Where the lessons stand."""
    base = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(base) / "vramplan" / "learnt.jsonl"


def machine_of(plan: Plan) -> str:
    """This machine and what the plan may use of it."""
    node = plan.node
    return f"{platform.node()}: {node.world_size} x {node.device.name}, {node.capacity_bytes} B"


def remember(plan: Plan, changes: Mapping[str, Any], cause: str, phase: str, path: Path | None = None) -> None:
    """Adds a lesson about ``plan``; one that cannot be written is lost, which costs a failure next time."""
    lesson = Lesson(plan_id(plan.run), dict(changes), cause, phase, machine_of(plan), dict(plan.versions), time.time())
    path = path or learnt_path()
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        append_line(path, json.dumps(asdict(lesson)))


def recall(plan: Plan, path: Path | None = None) -> Lesson | None:
    """The newest lesson about this very plan, here and with these versions."""
    try:
        lines = (path or learnt_path()).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return None
    known = (plan_id(plan.run), machine_of(plan), dict(plan.versions))
    for line in reversed(lines):
        with suppress(ValueError, TypeError):
            lesson = Lesson(**json.loads(line))
            if (lesson.plan, lesson.machine, dict(lesson.versions)) == known:
                return lesson
    return None
