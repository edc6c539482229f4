"""The directory of one training run: what lies where, and the events of ``metrics.jsonl``. Imports no torch."""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class RunDir:
    """Paths below ``root``; nothing is created by asking."""

    root: Path

    @property
    def plan(self) -> Path:
        """The plan that the run follows."""
        return self.root / "plan.yaml"

    @property
    def ds_config(self) -> Path:
        """DeepSpeed's config, as given to ``deepspeed.initialize``."""
        return self.root / "ds_config.json"

    @property
    def metrics(self) -> Path:
        """One event a line, in order of time; a step that was repeated after a resume stands there twice."""
        return self.root / "metrics.jsonl"

    @property
    def record(self) -> Path:
        """The measurement record, with the prediction beside it."""
        return self.root / "record.jsonl"

    @property
    def attempts(self) -> Path:
        """The ledger of the run's launches: plan, cause, bytes, seconds lost."""
        return self.root / "attempts.jsonl"

    @property
    def tensorboard(self) -> Path:
        return self.root / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        """``step-00000010`` and so on: whole checkpoints only."""
        return self.root / "checkpoints"

    @property
    def sample_losses(self) -> Path:
        """The loss of every sequence at every step (``data.hard_examples``)."""
        return self.root / "sample_losses.bin"

    @property
    def adapter(self) -> Path:
        """Trained adapters, as PEFT loads them."""
        return self.root / "adapter"

    @property
    def model(self) -> Path:
        """The trained model, as ``from_pretrained`` loads it (full training, or adapters merged)."""
        return self.root / "model"

    @property
    def lm_eval(self) -> Path:
        """All that lm_eval said of the trained model (``training.lm_eval``)."""
        return self.root / "lm_eval.json"

    @property
    def logs(self) -> Path:
        """Output of the launcher and of each rank."""
        return self.root / "logs"

    @property
    def ranks(self) -> Path:
        """What each rank says of itself: its phase while it lives, its failure when it ends."""
        return self.root / "ranks"

    def status_of(self, rank: int) -> Path:
        return self.ranks / f"rank{rank}.status.json"

    def failure_of(self, rank: int) -> Path:
        return self.ranks / f"rank{rank}.failure.json"

    def stop_of(self, port: int | str) -> Path:
        """Tells the ranks that met at ``port``, on whichever node, to end."""
        return self.ranks / f"stop-{port}"


def append_event(file_path: Path, kind: str, /, **fields: Any) -> None:
    """Adds one event, whole: a line of JSON with its kind under ``event`` and the time (seconds since 1970)."""
    append_line(file_path, json.dumps({"event": kind, **fields, "time": time.time()}))


def append_line(path: Path, line: str) -> None:
    """Adds a line. What a full disk left of an earlier one stays a line of its own, and spoils no other."""
    with path.open("ab+") as file:
        is_cut = file.tell() > 0 and file.seek(-1, os.SEEK_END) >= 0 and file.read(1) != b"\n"
        file.write(("\n" * is_cut + line + "\n").encode())


def read_events(path: Path) -> list[dict[str, Any]]:
    """Every whole event of the file so far; none where there is no file."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    return whole_events(content[: content.rfind(b"\n") + 1])


def whole_events(lines: bytes) -> list[dict[str, Any]]:
    """The events of whole lines; a line that a full disk cut off is none."""
    found = []
    for line in lines.splitlines():
        with suppress(ValueError):
            found.append(json.loads(line))
    return found


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file so that a reader sees either all of it or what was there before."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)
