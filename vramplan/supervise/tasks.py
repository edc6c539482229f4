"""Benchmark tasks of a finished run: their names checked before it, their scores taken after it, by lm_eval."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from vramplan.errors import RunFailedError, SpecError
from vramplan.measure.run_dir import RunDir, append_event
from vramplan.spec.run import RunSpec
from vramplan.supervise.afterwards import follow_afterwards
from vramplan.supervise.failure import TrainingFailed
from vramplan.supervise.supervisor import Listener
from vramplan.supervise.watch import STUCK_AFTER_S

_MODULE = "vramplan.train.harness"


def check_tasks(run: RunSpec) -> None:
    """Asks lm_eval for the tasks that a run names: after days of training would be late to learn that one is misspelt.

    Raises:
        SpecError: lm_eval does not know a task, or cannot read ``include_path``.
    """
    asked = run.training.lm_eval
    if asked is None:
        return
    if asked.include_path is not None and not Path(asked.include_path).is_dir():
        raise SpecError(f"training.lm_eval.include_path is {asked.include_path!r}, which is no directory")
    done = subprocess.run(
        [sys.executable, "-P", "-m", _MODULE, "--check"],
        input=asked.model_dump_json(),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        found = _last_line(done.stderr)
        key = "training.lm_eval." if done.returncode == SpecError.exit_code else "training.lm_eval cannot be checked: "
        raise SpecError(key + found)


def evaluate_tasks(run_dir: RunDir, listener: Listener, stuck_after_s: float = STUCK_AFTER_S) -> None:
    """Lets lm_eval judge what was trained, in a fresh process; scores come as events. A failure or a hang is a note
    and no more: the run is done.

    Raises:
        TrainingFailed: the user interrupted.
    """
    log = run_dir.logs / "lm_eval.log"
    try:
        code = follow_afterwards(run_dir, [_MODULE, "--run-dir", str(run_dir.root)], listener, log, stuck_after_s)
    except TrainingFailed:
        raise
    except RunFailedError as error:
        reason = str(error)
    else:
        if code == 0:
            return
        reason = f"signal {-code}" if code is not None and code < 0 else _last_line(log.read_text(errors="replace"))
    text = f"training.lm_eval gave no scores ({reason}; log: {log}); the run and what it saved are as they were"
    append_event(run_dir.metrics, "note", text=text)
    listener({"event": "note", "text": text})


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no word of why")
