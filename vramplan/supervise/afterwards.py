"""What is done with what was trained, each in a fresh process that is followed to its end and ended where it hangs."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from vramplan.errors import RunFailedError
from vramplan.measure.run_dir import RunDir
from vramplan.measure.work_done import WorkDone, work_of_tree
from vramplan.supervise.failure import TrainingFailed
from vramplan.supervise.interrupts import Interrupted, interrupts_raise
from vramplan.supervise.supervisor import INTERRUPTED_CODE, Listener, follow, started
from vramplan.supervise.tail import Tail
from vramplan.supervise.watch import STUCK_AFTER_S, Trouble

_LOOK_EVERY_S = 1.0
_LEAST_CPU_FRAC = 0.05
"""Of a core: threads that only wait wake up for less."""
_AGAIN = "what was trained is saved, and `vramplan train {} --resume` tries this again (log: {})"


def answer_sample(run_dir: RunDir, question: str, listener: Listener, stuck_after_s: float = STUCK_AFTER_S) -> None:
    """Reloads what was trained and lets it answer; the answer comes as an event.

    Raises:
        RunFailedError: the process failed or hung.
        TrainingFailed: the user interrupted.
    """
    failure = f"the trained model in {run_dir.root} gave no answer"
    _after(run_dir, ["--sample", question], listener, stuck_after_s, failure)


def merge_adapters(run_dir: RunDir, listener: Listener, stuck_after_s: float = STUCK_AFTER_S) -> None:
    """Writes the base model with the adapters merged into it.

    Raises:
        RunFailedError: the process failed or hung.
        TrainingFailed: the user interrupted.
    """
    failure = f"the adapters in {run_dir.adapter} could not be merged"
    _after(run_dir, ["--merge"], listener, stuck_after_s, failure)


def interpolate_with_base(run_dir: RunDir, listener: Listener, stuck_after_s: float = STUCK_AFTER_S) -> None:
    """Moves what was saved towards the base model.

    Raises:
        RunFailedError: the process failed or hung.
        TrainingFailed: the user interrupted.
    """
    failure = f"what was trained in {run_dir.root} could not be interpolated"
    _after(run_dir, ["--interpolate"], listener, stuck_after_s, failure)


def follow_afterwards(
    run_dir: RunDir, module: list[str], listener: Listener, log: Path, stuck_after_s: float = STUCK_AFTER_S
) -> int | None:
    """Runs a module of ours with its arguments after training; its exit code.

    Raises:
        RunFailedError: it did nothing for ``stuck_after_s`` seconds, and was ended; the text tells no more than that.
        TrainingFailed: the user interrupted; the process is ended.
    """
    tail = Tail(run_dir.metrics)
    with interrupts_raise():
        try:
            with started([sys.executable, "-P", "-m", *module], {}, log) as child:
                trouble = follow(child, tail, listener, AloneWatch(child.pid, stuck_after_s))
        except Interrupted as error:
            raise TrainingFailed("interrupted after training; what was trained is saved", INTERRUPTED_CODE) from error
    if trouble is not None and trouble.stuck_s is not None:
        raise RunFailedError(
            f"the process did nothing for {trouble.stuck_s:.0f} s and was ended (--stuck-after allows more)"
        )
    return child.poll()


class AloneWatch:
    """Sees whether a process without peers still does anything. Unlike that of a rank, which may spin while it waits
    for another, its time on the CPU counts, with that of the processes below it."""

    def __init__(self, pid: int, stuck_after_s: float) -> None:
        self._pid = str(pid)
        self._stuck_after_s = stuck_after_s
        self._last = work_of_tree(self._pid)
        self._last_look = time.monotonic()
        self._still_s = 0.0

    def look(self) -> Trouble:
        """For how long it has done nothing, if for too long."""
        passed = time.monotonic() - self._last_look
        if passed < _LOOK_EVERY_S:
            return Trouble()
        before, self._last = self._last, work_of_tree(self._pid)
        done = self._last - before
        self._last_look += passed
        least_ticks = _LEAST_CPU_FRAC * passed * os.sysconf("SC_CLK_TCK")
        # nothing counted at all: the system does not say, and what is not known is not ended
        works = done.moves_memory or done.cpu_ticks >= least_ticks or self._last == WorkDone()
        # a look that comes late (a machine that slept) counts for one
        self._still_s = 0.0 if works else self._still_s + min(passed, 2 * _LOOK_EVERY_S)
        return Trouble(stuck_s=self._still_s) if self._still_s > self._stuck_after_s else Trouble()


def _after(run_dir: RunDir, arguments: list[str], listener: Listener, stuck_after_s: float, failure: str) -> None:
    log = run_dir.logs / "after.log"
    module = ["vramplan.train.after", str(run_dir.root), *arguments]
    try:
        code = follow_afterwards(run_dir, module, listener, log, stuck_after_s)
    except TrainingFailed:
        raise
    except RunFailedError as error:
        raise RunFailedError(f"{failure}: {error}; {_AGAIN.format(run_dir.root, log)}") from error
    if code != 0:
        raise RunFailedError(f"{failure}; {_AGAIN.format(run_dir.root, log)}")
