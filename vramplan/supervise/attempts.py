"""The ledger of a run's attempts: what was run, why it ended, what it took. One line of JSON each."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vramplan.measure.run_dir import append_line
from vramplan.supervise.classify import MEMORY_CAUSES, PASSING_CAUSES

FINISHED = "finished"
"""Under ``cause`` of an attempt that came to the run's end."""
INTERRUPTED = "interrupted"
NOT_STARTED = "not started"
"""The launcher ended before any rank began."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """One launch of a run. Bytes are of the rank that failed; None where they are not known."""

    plan: str
    """``search.plan.plan_id``."""
    layout: str
    """The plan's decisions, in words."""
    cause: str
    """A value of ``Cause``, or one of the words above."""
    phase: str = ""
    rank: int | None = None
    step: int = 0
    """The optimizer step it ended in (from 1); 0 outside the steps."""
    requested_bytes: int | None = None
    held_bytes: int | None = None
    needed_bytes: int | None = None
    """Held and asked for together."""
    capacity_bytes: int | None = None
    """The most that tensors could have held."""
    predicted_bytes: int | None = None
    """What the estimate says of the phase it ended in."""
    first_step: int = 0
    """Optimizer steps that were done when it began."""
    last_saved_step: int = 0
    """Optimizer steps in the newest checkpoint when it ended."""
    last_step: int = 0
    """Optimizer steps that were done when it ended."""
    seconds: float = 0.0
    """Of the attempt, launch included."""
    seconds_lost: float = 0.0
    """Since the newest checkpoint, or since its launch."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the plan that the next attempt changes."""
    time: float = 0.0

    @property
    def is_memory(self) -> bool:
        """Whether it ran out of memory."""
        return self.cause in {cause.value for cause in MEMORY_CAUSES}

    @property
    def may_pass(self) -> bool:
        """Whether it ended by something that passes."""
        return self.cause in {cause.value for cause in PASSING_CAUSES}


def append(path: Path, attempt: Attempt) -> None:
    """Adds a line. A ledger that cannot be written (a full disk) does not end the run."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        append_line(path, json.dumps(asdict(attempt)))


def read(path: Path) -> tuple[Attempt, ...]:
    """Every whole line that this version understands, in order."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return ()
    return tuple(_parsed(lines))


def _parsed(lines: Sequence[str]) -> list[Attempt]:
    found = []
    for line in lines:
        with suppress(ValueError, TypeError):
            fields = json.loads(line)
            found.append(Attempt(**{name: fields[name] for name in Attempt.__dataclass_fields__ if name in fields}))
    return found
