"""What earlier runs of this user on this machine learnt: which plan ran out of memory, and which then went on.

One line of JSON each in ``$XDG_STATE_HOME/vramplan/learnt.jsonl`` (``~/.local/state``). A line counts only for the same
plan on the same machine with the same versions; deleting the file forgets all.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vramplan.measure.run_dir import append_line
from vramplan.search.lower import RUNGS, changes, with_changes
from vramplan.search.plan import Plan, plan_id
from vramplan.search.space import divisors
from vramplan.spec.run import RunSpec
from vramplan.supervise.attempts import Attempt

_LIMITS = {"RLIMIT_DATA": resource.RLIMIT_DATA, "RLIMIT_AS": resource.RLIMIT_AS}
IN_PLACE = "activations or logits, met in place"
"""Cause of a lesson that a step taken anew in the same process has taught."""


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
    """This machine and what the plan may use of it; limits of this process (``ulimit``) too, which the ranks inherit:
    what did not fit under one may fit without."""
    node = plan.node
    limits = {name: resource.getrlimit(number)[0] for name, number in _LIMITS.items()}
    limited = "".join(f", {name} {soft} B" for name, soft in limits.items() if soft != resource.RLIM_INFINITY)
    return f"{platform.node()}: {node.world_size} x {node.device.name}, {node.capacity_bytes} B{limited}"


def remember(
    plan: Plan, changed: Mapping[str, Any], cause: str, phase: str, path: Path | None = None, of: str | None = None
) -> None:
    """Adds a lesson about ``plan``, or about another of its run (``of``, a ``plan_id``); one that cannot be written is
    lost, which costs a failure next time."""
    about = of or plan_id(plan.run)
    lesson = Lesson(about, dict(changed), cause, phase, machine_of(plan), dict(plan.versions), time.time())
    path = path or learnt_path()
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        append_line(path, json.dumps(asdict(lesson)))


def learn(asked: Plan, finished: Plan, tried: Sequence[Attempt], halved: Mapping[str, Any] | None) -> None:
    """What the next run should start with: of the plan that was asked for, and of every other that ran out of memory
    on the way (the run may have been resumed since, with the plan that was reached then)."""
    ran = finished.run if halved is None else with_micro_batches(finished.run, halved["micro_batch_size"])
    taught = {each.plan: (changed, each.cause, each.phase) for each, changed in _ways_down(tried, finished, ran)}
    last = next((attempt for attempt in reversed(tried) if attempt.is_memory), None)
    if halved is not None:
        taught[plan_id(finished.run)] = (dict(changes(finished.run, ran)), IN_PLACE, f"step {halved['step'] + 1}")
    direct = dict(changes(asked.run, ran))
    if last is not None and direct and with_changes(asked.run, direct) == ran:
        taught[plan_id(asked.run)] = (direct, last.cause, last.phase)
    for plan, (changed, cause, phase) in taught.items():
        remember(asked, changed, cause, phase, of=plan)


def _ways_down(tried: Sequence[Attempt], finished: Plan, ran: RunSpec) -> Iterator[tuple[Attempt, Mapping[str, Any]]]:
    """The attempts that led to the plan that finished, newest first, each with all that was changed after it."""
    plan, changed = plan_id(finished.run), dict(changes(finished.run, ran))
    for attempt in reversed(tried):
        if attempt.changes:
            if not set(attempt.changes) <= set(RUNGS):  # what follows is another training
                return
            plan, changed = attempt.plan, {**attempt.changes, **changed}
            yield attempt, changed
        elif attempt.plan != plan:  # the run was resumed with a plan of the user's
            return


def with_micro_batches(run: RunSpec, most: int) -> RunSpec:
    """The run with micro-batches of ``most`` sequences, or of fewer where that does not divide a rank's share."""
    share = (run.micro_batch_size or 1) * (run.grad_accum_steps or 1)
    size = max(each for each in divisors(share) if each <= most)
    return run.model_copy(update={"micro_batch_size": size, "grad_accum_steps": share // size})


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
