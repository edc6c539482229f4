"""Runs a plan: launches its ranks, passes on what they report, and leaves no process behind. Imports no torch."""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from vramplan.data.source import check_rows
from vramplan.emit.launch import launch_command, launch_environment, local_launcher
from vramplan.errors import DataError, LegalityError, SpecError, UnknownNameError
from vramplan.measure.run_dir import RunDir
from vramplan.measure.snapshots import has_saved_state, remove_forgotten
from vramplan.search.legal_formats import why_not_trained
from vramplan.search.plan import Plan
from vramplan.spec.check import check_run
from vramplan.spec.data import SourceSpec, as_source
from vramplan.spec.run import RunSpec
from vramplan.supervise.child import Child, free_port
from vramplan.supervise.failure import TrainingFailed, explain
from vramplan.supervise.interrupts import Interrupted, interrupts_raise, interrupts_wait
from vramplan.supervise.kills import KillCounter
from vramplan.supervise.other_nodes import end_other_nodes
from vramplan.supervise.shared_memory import remove_buffers, remove_forgotten_buffers
from vramplan.supervise.tail import Tail
from vramplan.supervise.watch import PATIENCE, Patience, RankWatch, Trouble

_POLL_S = 0.1
_LAST_WORDS_S = 10.0
"""How long the launcher may take to end its ranks and itself after one has failed: its code is that of the rank."""
_NEEDED = ("torch", "transformers", "deepspeed", "peft", "accelerate")
INTERRUPTED_CODE = 130
"""Exit code after Ctrl-C or SIGTERM, as shells have it."""

Listener = Callable[[dict[str, Any]], None]


def check_before_launch(plan: Plan) -> None:
    """What can be found wrong in a second, before any process starts or any device is touched.

    Raises:
        SpecError: a package is missing, or a key names what the run does not have.
        LegalityError: the layout is not trained.
        DataError: a row is malformed, or a file is not there.
    """
    if refused := why_not_trained(plan.run):
        raise LegalityError(refused)
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise SpecError(f"training needs {', '.join(missing)}: pip install 'vramplan[train]'")
    for name in plan.run.training.trackers:
        if importlib.util.find_spec(name) is None:
            raise SpecError(f"training.trackers names {name}, which is not installed: pip install {name}, or drop it")
    if plan.run.training.lm_eval is not None and importlib.util.find_spec("lm_eval") is None:
        raise SpecError("training.lm_eval needs lm-eval: pip install 'vramplan[eval]', or drop it")
    check_run(plan.run)
    if plan.run.training.snapshot_every is not None and plan.node.num_nodes > 1:
        raise SpecError("training.snapshot_every: snapshots in shared memory are of one node; leave it out on several")
    for source in plan.run.data.sources:
        check_rows(source)
    for key, source in _general_texts(plan.run).items():
        try:
            check_rows(source)
        except (DataError, UnknownNameError) as error:
            raise DataError(f"{key}: {error}") from error


def _general_texts(run: RunSpec) -> dict[str, SourceSpec]:
    """What is read beside the training data, by the key that names it."""
    named = {f"data.eval_sets.{name}": as_source(source) for name, source in run.data.eval_sets.items()}
    return named if run.retain.ewc is None else {**named, "retain.ewc.data": as_source(run.retain.ewc.data)}


def run_plan(
    plan: Plan,
    run_dir: RunDir,
    listener: Listener,
    *,
    resuming: bool = False,
    probing: bool = False,
    retrying: bool = True,
    hostfile: Path | None = None,
    patience: Patience = PATIENCE,
) -> None:
    """Trains: returns when every rank came to its end. ``listener`` is given each event of ``metrics.jsonl``.

    ``probing``: the worst batch is run for two steps, and nothing else (``train/probe_run.py``). ``retrying``: a rank
    that is alone may take a step anew by itself (``train/in_place.py``).

    All ranks are ended as soon as one has failed, is gone, or ``patience`` takes them to hang.

    Raises:
        TrainingFailed: a rank failed, hung or was killed, or the user interrupted; no process of the run is left.
    """
    _clear_old_failures(run_dir)
    remove_forgotten_buffers()
    remove_forgotten()
    port, kills = free_port(), KillCounter()
    command = launch_command(
        plan.node,
        run_dir.plan,
        run_dir.root,
        resume=resuming and not probing,
        probe=probing,
        retry=retrying,
        port=port,
        hostfile=hostfile,
        log_dir=run_dir.logs,
        executable=local_launcher(),
    )
    tail = Tail(run_dir.metrics)
    watch = RankWatch(run_dir, patience.silent_after_s, patience.stuck_after_s, kills=kills)
    others = (lambda: end_other_nodes(run_dir, port)) if plan.node.num_nodes > 1 else None
    with interrupts_raise():
        try:
            environment = launch_environment(plan.run, plan.node)
            with started(command, environment, run_dir.logs / "launcher.log", others) as child:
                trouble = follow(child, tail, listener, watch, run_dir.status_of(0))
                code = child.poll()
        except Interrupted as error:
            raise interrupted(run_dir) from error
        finally:
            remove_buffers(port)
    if trouble is not None:
        raise explain(run_dir, code, trouble, kills.risen())


@contextmanager
def started(
    command: Sequence[str], environment: Mapping[str, str], log: Path, end_others: Callable[[], object] | None = None
) -> Iterator[Child]:
    """A command in a process group that is ended, whatever happens: an interrupt waits while it is started or ended.

    ``end_others`` ends first what the group does not hold.
    """
    child: Child | None = None
    try:
        with interrupts_wait():
            child = Child(command, environment, log)
        yield child
    finally:
        if child is not None:
            with interrupts_wait():
                if end_others is not None:
                    end_others()
                child.end()


def interrupted(run_dir: RunDir) -> TrainingFailed:
    """The error of a run that the user ended; no rank is left."""
    if has_saved_state(run_dir):
        after = f"`vramplan train {run_dir.plan} -o {run_dir.root} --resume` goes on from the last checkpoint"
    else:
        after = "nothing was saved: there was no checkpoint yet"
    return TrainingFailed(f"interrupted; all ranks are ended, and {after}", INTERRUPTED_CODE)


class Watch(Protocol):
    """Looks at what runs."""

    def look(self) -> Trouble:
        """What is wrong now."""


def follow(child: Child, tail: Tail, listener: Listener, watch: Watch, status: Path | None = None) -> Trouble | None:
    """Passes events on until the launcher ends or ``watch`` finds trouble; None where the run said that it was
    finished.

    Changes of the phase in ``status`` come as events too. The launcher's code alone does not tell that all went well:
    it is 0 too when a signal killed DeepSpeed's inner launcher.
    """
    finished, phase, trouble, deadline = False, "", Trouble(), float("inf")
    while True:
        # asked before reading, so that nothing written before the end is missed
        ended = child.poll() is not None or time.monotonic() > deadline
        for event in tail.read():
            finished = finished or event["event"] == "end"
            listener(event)
        before, phase = phase, _phase(status) or phase
        if phase != before:
            listener({"event": "phase", "phase": phase})
        if not ended and not trouble:
            trouble = watch.look()
            if trouble:
                deadline = time.monotonic() + (_LAST_WORDS_S if trouble.is_of_end else 0.0)
        if ended:
            return None if finished and (child.poll() == 0 or trouble.launcher_hangs) else trouble
        time.sleep(_POLL_S)


def _phase(status: Path | None) -> str | None:
    """What a rank says that it is doing; None where it says nothing yet (or the file is being rewritten)."""
    try:
        return str(json.loads(status.read_text(encoding="utf-8"))["phase"]) if status else None
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def _clear_old_failures(run_dir: RunDir) -> None:
    for path in [
        path for kind in ("rank*.failure.json", "rank*.status.json", "stop-*") for path in run_dir.ranks.glob(kind)
    ]:
        path.unlink()
