"""Trains to the end although memory runs out or a process dies: classify, choose again, go on from the checkpoint.

Each attempt is a fresh set of processes. Only want of memory changes the plan; what may pass (a killed process, a
hang, a lost connection) is tried again as it is; everything else ends the run with its reason.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vramplan.errors import NoWholeCheckpointError, VramplanError
from vramplan.facts.architecture import Architecture
from vramplan.measure.run_dir import RunDir, append_event
from vramplan.measure.snapshots import has_saved_state, held_bytes, newest_saved_step, put_away
from vramplan.search.lower import Below, Lowered, with_changes, words_of
from vramplan.search.plan import Plan, plan_id
from vramplan.search.space import Candidate
from vramplan.supervise import attempts as ledger
from vramplan.supervise.attempts import Attempt
from vramplan.supervise.failure import TrainingFailed
from vramplan.supervise.free_memory import free_bytes, wait_until_free
from vramplan.supervise.interrupts import Interrupted, interrupts_raise
from vramplan.supervise.ladder import Exhausted, Ladder, judged
from vramplan.supervise.learnt import learn, learnt_path, recall, with_micro_batches
from vramplan.supervise.offers import Offer, first_allowed, offers
from vramplan.supervise.supervisor import INTERRUPTED_CODE, Listener, interrupted, run_plan
from vramplan.supervise.watch import PATIENCE, Patience

NOTHING_LEFT_CODE = 4
"""Exit code of a run that ran out of memory under every plan that keeps its training as it is."""
MAX_PLANS = 8
"""Changes of the plan in one run: each is a refuted prediction, and so many are a sign of another fault. As many more
are made where other training is allowed."""
MAX_REPEATS = 3
"""Launches of one plan, without a step won, after something that may pass."""


@dataclass
class Progress:
    """How far an attempt came, by its events; ``listener`` hears them too."""

    listener: Listener
    saved_step: int = 0
    """Before the first event: of what it goes on from."""
    started: float = field(default_factory=time.time)
    halved: dict[str, Any] | None = None
    """The last event of a step that was taken anew, in the same process, with smaller micro-batches."""
    first_step: int = field(init=False)
    last_step: int = field(init=False)
    saved_at: float | None = None

    def __post_init__(self) -> None:
        self.first_step = self.last_step = self.saved_step

    def on_event(self, event: dict[str, Any]) -> None:
        kind = event["event"]
        if kind in ("start", "resumed"):
            self.first_step = self.last_step = self.saved_step = event["step"]
        elif kind == "step":
            self.last_step = event["step"]
        elif kind == "halved":
            self.halved = event
        elif kind in ("checkpoint", "snapshot"):
            self.saved_step, self.saved_at = event["step"], event["time"]
        self.listener(event)

    @property
    def seconds_lost(self) -> float:
        return time.time() - (self.saved_at or self.started)


@dataclass(frozen=True, slots=True)
class Anew:
    """The same plan from the first step: nothing that was saved is whole."""

    plan: Plan


Decision = Lowered | Offer | Anew | None
"""What follows an attempt; None: the same plan goes on from what was saved."""


@dataclass(frozen=True, slots=True)
class Terms:
    """How a run is launched and what it may change."""

    hostfile: Path | None = None
    patience: Patience = PATIENCE
    allowed: frozenset[str] = frozenset()
    """Of ``offers.ALLOWABLE``: changes of the training itself."""
    probing: bool = False
    """Whether the worst batch is run alone (``train/probe_run.py``)."""


def train_to_the_end(
    plan: Plan,
    run_dir: RunDir,
    architecture: Architecture,
    listener: Listener,
    terms: Terms = Terms(),
    *,
    resuming: bool = False,
) -> Plan:
    """Runs a plan, and those that follow from its failures, until one finishes; gives that one.

    Raises:
        TrainingFailed: as ``run_plan``, where another attempt would not help; code 4 where no plan is left, 2 where the
            supervisor's own files cannot be written.
    """
    with interrupts_raise():  # between two attempts too
        try:
            return _until_finished(plan, run_dir, architecture, listener, terms, resuming)
        except Interrupted as error:
            raise interrupted(run_dir) from error
        except OSError as error:  # a full disk: what ranks meet of it comes as their failure
            what = f"{error.filename or run_dir.root} cannot be written ({error.strerror})"
            raise TrainingFailed(
                f"{what}; --resume goes on from the last checkpoint", VramplanError.exit_code
            ) from error


def _until_finished(
    plan: Plan, run_dir: RunDir, architecture: Architecture, listener: Listener, terms: Terms, resuming: bool
) -> Plan:
    tried = list(ledger.read(run_dir.attempts)) if resuming else []
    asked, user_resumes = plan, resuming
    if not resuming:
        plan = _start_from_what_was_learnt(plan, run_dir, architecture, listener)
    while True:
        free, kept = free_bytes(), held_bytes(run_dir)
        progress = Progress(listener, (newest_saved_step(run_dir) or 0) if resuming else 0)
        try:
            run_plan(
                plan,
                run_dir,
                progress.on_event,
                resuming=resuming,
                probing=terms.probing,
                hostfile=terms.hostfile,
                patience=terms.patience,
            )
        except TrainingFailed as error:
            attempt = _attempt(plan, progress, architecture, error)
            decided: Decision | TrainingFailed
            if not user_resumes and _may_begin_anew(run_dir, error):
                decided = Anew(plan)
            elif (halved := _as_it_ran(plan, architecture, progress, error)) is not None:
                decided = halved
            else:
                decided = _decide(plan, run_dir, architecture, [*tried, attempt], error, terms)
            if isinstance(decided, Lowered | Offer):
                attempt = replace(attempt, changes=dict(decided.changes))
            ledger.append(run_dir.attempts, attempt)
            tried.append(attempt)
            if isinstance(decided, TrainingFailed):
                raise decided from error
            _announce(run_dir, listener, attempt, str(error.verdict), decided)
            host, *devices = free
            wait_until_free((host + kept - held_bytes(run_dir), *devices))  # snapshots stay
            (plan, resuming), user_resumes = _go_on(plan, run_dir, decided), False
        else:
            ledger.append(run_dir.attempts, replace(_ended(plan, progress), cause=ledger.FINISHED, seconds_lost=0.0))
            learn(asked, plan, tried, progress.halved)
            return plan


def _as_it_ran(plan: Plan, architecture: Architecture, progress: Progress, error: TrainingFailed) -> Lowered | None:
    """Where steps were taken anew in the same process, and it ended all the same: the plan with the micro-batches that
    were left. What ran out of memory is not begun with again, and a fresh process holds nothing of what failed."""
    verdict = error.verdict
    if progress.halved is None or verdict is None or not (verdict.is_memory or verdict.may_pass):
        return None
    with suppress(VramplanError):
        run = with_micro_batches(plan.run, progress.halved["micro_batch_size"])
        return Below(plan, architecture, keep_stage=True).with_run(run)
    return None


def _start_from_what_was_learnt(plan: Plan, run_dir: RunDir, architecture: Architecture, listener: Listener) -> Plan:
    lesson = recall(plan)
    if lesson is None:
        return plan
    try:
        better = Below(plan, architecture, keep_stage=True).with_run(with_changes(plan.run, lesson.changes))
    except VramplanError:  # what was right once cannot be planned any more
        return plan
    better.plan.save(run_dir.plan)
    text = (
        f"an earlier run of this plan on this machine ran out of memory in {lesson.phase}; this one starts with "
        f"{words_of(better.changes)} (remembered in {learnt_path()})"
    )
    listener({"event": "note", "text": text, "predicted_bytes": better.plan.prediction.allocated_peak_bytes})
    return better.plan


def _may_begin_anew(run_dir: RunDir, error: TrainingFailed) -> bool:
    """Whether all that was saved is damaged, for the first time: no data, no batch and no rate is lost by beginning
    again, only time. Where a user asks for the resume, that is theirs to decide."""
    marker = None if error.verdict is None else error.verdict.marker
    return marker is not None and marker.kind == NoWholeCheckpointError.__name__ and not _damaged(run_dir).exists()


def _damaged(run_dir: RunDir) -> Path:
    return run_dir.root / "checkpoints-damaged"


def _set_aside(run_dir: RunDir, target: Path) -> None:
    """Moves all that was saved out of the way of a run that begins again."""
    put_away(run_dir)
    if run_dir.checkpoints.exists():
        run_dir.checkpoints.rename(target)


def _go_on(plan: Plan, run_dir: RunDir, decided: Decision) -> tuple[Plan, bool]:
    """Puts the next plan where the ranks read it; and whether it goes on from what was saved."""
    if decided is None:
        return plan, True
    if isinstance(decided, Anew):
        _set_aside(run_dir, _damaged(run_dir))
        _damaged(run_dir).mkdir(exist_ok=True)  # also where a snapshot was all there was: this is done once
        return plan, False
    put_record_aside(run_dir, decided.plan)
    decided.plan.save(run_dir.plan)
    if isinstance(decided, Lowered):
        if decided.plan.run.training.snapshot_every is None:
            put_away(run_dir)  # the memory of those that were written
        return decided.plan, True
    # of another training: nothing of it is of use to this one
    _set_aside(run_dir, run_dir.root / f"checkpoints-{plan_id(plan.run)}")
    return decided.plan, False


def _decide(
    plan: Plan,
    run_dir: RunDir,
    architecture: Architecture,
    tried: Sequence[Attempt],
    error: TrainingFailed,
    terms: Terms,
) -> Decision | TrainingFailed:
    """The plan to go on with, None for the same one, or the error that ends the run."""
    verdict = error.verdict
    if verdict is None:
        return error
    if verdict.may_pass:
        return error if _repeats(tried) > MAX_REPEATS else None
    if not verdict.is_memory:
        return error
    ladder, num_failed = Ladder(plan, architecture, tried), len({each.plan for each in tried if each.is_memory})
    found: Lowered | Exhausted = Exhausted(f"{MAX_PLANS} other plans did not help")
    if num_failed <= MAX_PLANS:
        found = ladder.next(verdict, keep_stage=_is_tied(plan, run_dir))
    if isinstance(found, Lowered):
        return found
    others = offers(plan, architecture, ladder.room_for_tensors)
    allowed = first_allowed(others, terms.allowed)
    if allowed is not None and num_failed <= 2 * MAX_PLANS:
        return allowed
    listed = f"; what would, but changes it: {'; or '.join(map(str, others))}" if others else ""
    return TrainingFailed(f"{error}; {found.reason}{listed}", NOTHING_LEFT_CODE, verdict)


def put_record_aside(run_dir: RunDir, following: Plan) -> None:
    """What was measured under the plan that lies there is not compared with what is predicted of another.

    Raises:
        OSError: the file cannot be renamed.
    """
    if not (run_dir.record.exists() and run_dir.plan.exists()):
        return
    with suppress(VramplanError):  # a plan that cannot be read any more: nothing is known of its record
        before = plan_id(Plan.load(run_dir.plan).run)
        if before != plan_id(following.run):
            run_dir.record.rename(run_dir.root / f"record-{before}.jsonl")


def _repeats(tried: Sequence[Attempt]) -> int:
    """How many attempts in a row ended by something that passes without a new checkpoint."""
    count = 0
    for attempt in reversed(tried):
        if not attempt.may_pass or attempt.last_saved_step > attempt.first_step:
            break
        count += 1
    return count


def _is_tied(plan: Plan, run_dir: RunDir) -> bool:
    """Whether only plans that cut the optimizer's state as this one does can read what was saved, or train the same."""
    optimizer = plan.run.optimizer
    return not optimizer.is_elementwise or (has_saved_state(run_dir) and not optimizer.state_can_be_cut_anew)


def _label(plan: Plan) -> str:
    """The plan's decisions, in words."""
    label, layout = Candidate.of(plan.run).label(), plan.run.layout
    return label if layout is None or layout.sp == 1 else f"{label}, each sequence on {layout.sp} ranks"


def _ended(plan: Plan, progress: Progress) -> Attempt:
    return Attempt(
        plan=plan_id(plan.run),
        layout=_label(plan),
        cause=ledger.INTERRUPTED,
        first_step=progress.first_step,
        last_saved_step=progress.saved_step,
        last_step=progress.last_step,
        seconds=time.time() - progress.started,
        seconds_lost=progress.seconds_lost,
        time=time.time(),
    )


def _attempt(plan: Plan, progress: Progress, architecture: Architecture, error: TrainingFailed) -> Attempt:
    ended, verdict = _ended(plan, progress), error.verdict
    if verdict is None:
        return ended if error.exit_code == INTERRUPTED_CODE else replace(ended, cause=ledger.NOT_STARTED)
    return judged(ended, plan, architecture, verdict)


def _announce(run_dir: RunDir, listener: Listener, attempt: Attempt, reason: str, decided: Decision) -> None:
    """Says what happened and what follows, to the listener and in the run's events."""
    kept = 0 if isinstance(decided, Offer | Anew) else attempt.last_saved_step
    fields: dict[str, Any] = {
        "reason": reason,
        "cause": attempt.cause,
        "phase": attempt.phase,
        "from_step": kept,
        "steps_repeated": max(0, attempt.last_step - kept),
        "seconds_lost": attempt.seconds_lost,
        "changes": dict(attempt.changes),
        "layout": attempt.layout if decided is None else _label(decided.plan),
    }
    if decided is not None:
        fields["predicted_bytes"] = decided.plan.prediction.allocated_peak_bytes
    with suppress(OSError):  # a full disk
        append_event(run_dir.metrics, "recovery", **fields)
    listener({"event": "recovery", **fields})
