"""What the supervisor makes of attempts that end early; the attempts themselves are acted."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vramplan.errors import NoWholeCheckpointError
from vramplan.facts.devices import resolve_node
from vramplan.facts.resolve import resolve_architecture
from vramplan.measure.marker import Marker, MemoryState
from vramplan.measure.run_dir import RunDir
from vramplan.measure.snapshots import snapshots_of
from vramplan.search.lower import Below, Lowered, with_changes
from vramplan.search.plan import Plan, plan_id
from vramplan.search.planner import make_plan
from vramplan.spec.run import HardwareSpec, RunSpec
from vramplan.supervise import attempts, learnt, recover
from vramplan.supervise.attempts import Attempt
from vramplan.supervise.classify import Cause, Verdict
from vramplan.supervise.failure import TrainingFailed
from vramplan.supervise.ladder import Ladder
from vramplan.supervise.recover import NOTHING_LEFT_CODE, Terms
from vramplan.supervise.supervisor import INTERRUPTED_CODE

Told = tuple[list[dict[str, Any]], tuple[Attempt, ...]]
Act = Callable[[Plan, RunDir, Callable[[dict[str, Any]], None]], None]
TERMS = Terms()
KILLED = TrainingFailed("killed", 3, Verdict(Cause.KILLED, "resume", 0))
LOGITS = Verdict(Cause.LOGITS, "step2.micro1.forward", 0, 2, MemoryState(2**30, 2**33, 2**33, 2**20))
OUT_OF_MEMORY = TrainingFailed("out of memory", 3, LOGITS)


@pytest.fixture(scope="module")
def plan() -> Plan:
    run = RunSpec(
        model="meta-llama/Llama-3.2-1B-Instruct",
        global_batch_size=8,
        micro_batch_size=4,
        seq_len=2048,
        hardware=HardwareSpec(gpu="h100-80gb", gpus_per_node=1, host_memory="256GiB"),
    )
    return make_plan(run, resolve_node(run.hardware), resolve_architecture(run))


@pytest.fixture
def learnt_file(monkeypatch, tmp_path) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return learnt.learnt_path()


@pytest.fixture
def acted(monkeypatch, plan, learnt_file, tmp_path):
    """Runs acts one after the other in place of attempts; what was said, and what the ledger holds."""
    monkeypatch.setattr(recover, "wait_until_free", lambda _: True)

    def run(
        *acts: Act, of: Plan = plan, resuming: bool = False, terms: Terms = TERMS
    ) -> tuple[list[dict[str, Any]], tuple[Attempt, ...]]:
        said, left, run_dir = [], list(acts), RunDir(tmp_path / "run")
        run_dir.root.mkdir(exist_ok=True)
        monkeypatch.setattr(recover, "run_plan", lambda plan, where, listen, **_: left.pop(0)(plan, where, listen))
        architecture = resolve_architecture(of.run)
        try:
            recover.train_to_the_end(of, run_dir, architecture, said.append, terms, resuming=resuming)
        except TrainingFailed as error:
            said.append({"event": "failed", "error": error})
        assert left == []
        return said, attempts.read(run_dir.attempts)

    return run


def fails(error: TrainingFailed, saved: int = 0) -> Act:
    def act(plan: Plan, run_dir: RunDir, listen: Callable[[dict[str, Any]], None]) -> None:
        if saved:
            (run_dir.checkpoints / f"step-{saved:08d}").mkdir(parents=True)
            listen({"event": "start", "step": 0})
            listen({"event": "checkpoint", "step": saved, "time": 1.0})
        raise error

    return act


def finishes(*_: Any) -> None:
    pass


def test_a_failure_before_the_first_event_says_what_it_goes_on_from(acted):
    """Out of the resume itself, say: no event has told yet which checkpoint it is."""
    said, ledger = acted(fails(KILLED, saved=3), fails(KILLED), finishes)
    assert [event["from_step"] for event in said if event["event"] == "recovery"] == [3, 3]
    assert [(each.first_step, each.last_saved_step) for each in ledger] == [(0, 3), (3, 3), (3, 3)]
    assert [event["steps_repeated"] for event in said if event["event"] == "recovery"] == [0, 0]


def damaged() -> TrainingFailed:
    marker = Marker(
        rank=0,
        phase="resume",
        kind=NoWholeCheckpointError.__name__,
        message="no whole checkpoint",
        by_user=True,
        exit_code=2,
        time=1.0,
    )
    return TrainingFailed("no whole checkpoint", 2, Verdict(Cause.USER, "resume", 0, marker=marker))


def test_a_run_whose_only_checkpoint_is_damaged_begins_anew_once(acted, tmp_path):
    said, ledger = acted(fails(KILLED, saved=3), fails(damaged()), finishes)
    assert [event["from_step"] for event in said if event["event"] == "recovery"] == [3, 0]
    assert [each.cause for each in ledger] == ["a killed process", "the user's own error", "finished"]
    assert ledger[-1].first_step == 0
    assert (tmp_path / "run" / "checkpoints-damaged" / "step-00000003").exists()
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_where_a_damaged_snapshot_is_all_there_is_the_run_begins_anew_too(acted, tmp_path):
    said, _ = acted(fails(KILLED), fails(damaged()), finishes)
    assert not [event for event in said if event["event"] == "failed"]
    assert (tmp_path / "run" / "checkpoints-damaged").is_dir()


def test_a_second_time_and_where_a_user_resumes_damage_ends_the_run(acted, tmp_path):
    assert acted(fails(damaged()), resuming=True)[0][-1]["error"].exit_code == 2
    said, _ = acted(fails(KILLED, saved=3), fails(damaged()), fails(KILLED, saved=3), fails(damaged()))
    assert said[-1]["error"].exit_code == 2


@pytest.mark.parametrize("error", [KILLED, OUT_OF_MEMORY])
def test_after_a_step_taken_anew_smaller_micro_batches_are_what_the_next_attempt_has(acted, plan, tmp_path, error):
    def halves_and_dies(of: Plan, run_dir: RunDir, listen: Callable[[dict[str, Any]], None]) -> None:
        of.save(run_dir.plan)
        run_dir.record.write_text("{}")
        listen({"event": "halved", "step": 1, "micro_batch_size": 2, "reason": "r"})
        raise error

    ran = []
    said, ledger = acted(halves_and_dies, lambda of, *_: ran.append(of))
    assert (ran[0].run.micro_batch_size, ran[0].run.grad_accum_steps) == (2, 4)
    assert Plan.load(tmp_path / "run" / "plan.yaml").run == ran[0].run
    assert [each.plan for each in ledger] == [plan_id(plan.run), plan_id(ran[0].run)]
    assert (tmp_path / "run" / f"record-{plan_id(plan.run)}.jsonl").exists()
    assert not (tmp_path / "run" / "record.jsonl").exists()
    (recovery,) = (event for event in said if event["event"] == "recovery")
    assert recovery["changes"] == ledger[0].changes == {"micro_batch_size": 2, "grad_accum_steps": 4}


def test_a_record_stays_with_its_own_plan(plan, tmp_path):
    run_dir = RunDir(tmp_path)
    plan.save(run_dir.plan)
    run_dir.record.write_text("{}")
    longer = plan.run.training.model_copy(update={"max_steps": 7})
    recover.put_record_aside(run_dir, replace(plan, run=plan.run.model_copy(update={"training": longer})))
    assert run_dir.record.exists()
    recover.put_record_aside(run_dir, replace(plan, run=plan.run.model_copy(update={"seq_len": 1024})))
    assert not run_dir.record.exists()


def test_memory_that_snapshots_keep_is_not_waited_for(acted, monkeypatch, tmp_path):
    expected = []
    monkeypatch.setattr(recover, "free_bytes", lambda: (1000, 70))
    monkeypatch.setattr(recover, "wait_until_free", expected.append)
    memory = snapshots_of(RunDir(tmp_path / "run"))

    def takes_a_snapshot(*_):
        (memory / "step-00000002").mkdir(parents=True)
        (memory / "step-00000002" / "shard").write_bytes(b"x" * 300)
        raise KILLED

    try:
        acted(takes_a_snapshot, fails(KILLED), finishes)
    finally:
        shutil.rmtree(memory)
    assert expected == [(700, 70), (1000, 70)]


def test_a_launcher_that_starts_no_rank_is_not_an_interrupt(acted):
    _, (attempt,) = acted(fails(TrainingFailed("the launcher ended with code 2 before any rank started")))
    assert attempt.cause == attempts.NOT_STARTED
    _, (_, attempt) = acted(fails(TrainingFailed("interrupted", INTERRUPTED_CODE)), resuming=True)
    assert attempt.cause == attempts.INTERRUPTED


def test_a_plan_that_does_not_fit_on_the_disk_is_one_sentence(acted, monkeypatch, tmp_path):
    def full(_plan, path):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(Plan, "save", full)
    said, _ = acted(fails(OUT_OF_MEMORY))
    error = said[-1]["error"]
    assert str(error).startswith(f"{tmp_path}/run/plan.yaml cannot be written (No space left on device); --resume")
    assert error.exit_code == 2


FULL_TRAINING_DOES_NOT_FIT = TrainingFailed(
    "out of memory", 3, replace(LOGITS, cause=Cause.STEP, memory=MemoryState(2**20, 10 * 2**30, 10 * 2**30, 0))
)


@pytest.mark.parametrize("allowed", [{"method"}, set()])
def test_what_is_allowed_is_done_after_the_last_plan_and_begins_anew(acted, plan, monkeypatch, tmp_path, allowed):
    monkeypatch.setattr(recover, "MAX_PLANS", 1)
    monkeypatch.setattr(recover, "Ladder", OnePlanOnly)
    run_dir, terms = RunDir(tmp_path / "run"), Terms(allowed=frozenset(allowed))
    failures = [fails(FULL_TRAINING_DOES_NOT_FIT, saved=3), fails(FULL_TRAINING_DOES_NOT_FIT)]
    said, ledger = acted(*failures, *[finishes] * len(allowed), terms=terms)
    assert len({each.plan for each in ledger}) == len(ledger)
    if not allowed:
        assert said[-1]["error"].exit_code == NOTHING_LEFT_CODE
        assert "; 1 other plans did not help; what would, but changes it: " in str(said[-1]["error"])
        assert "--allow method" in str(said[-1]["error"])
        return
    assert "method.kind" in ledger[1].changes
    assert Plan.load(run_dir.plan).run.method.kind == "lora"
    assert [event["from_step"] for event in said if event["event"] == "recovery"] == [3, 0]
    assert not run_dir.checkpoints.exists()  # of another training: put aside
    assert list(run_dir.root.glob("checkpoints-*/step-00000003"))
    assert learnt.recall(plan) is None  # what finished is another training


class OnePlanOnly(Ladder):
    """Finds the same as it is, with other micro-batches, in no time."""

    def next(self, verdict: Verdict, *, keep_stage: bool) -> Lowered:
        run = with_changes(self._plan.run, {"micro_batch_size": 2, "grad_accum_steps": 4})
        return Below(self._plan, self._architecture, keep_stage=True).with_run(run)


def test_what_was_learnt_before_an_interrupt_is_remembered_when_the_run_is_done(acted, plan, learnt_file):
    """The plan that is resumed is the one that was reached; the plan that was asked for is met again next time."""
    _, (first, _) = acted(fails(OUT_OF_MEMORY), fails(TrainingFailed("interrupted", INTERRUPTED_CODE)))
    assert first.plan == plan_id(plan.run)
    assert not learnt_file.exists()
    reached = Below(plan, resolve_architecture(plan.run), keep_stage=True).with_run(
        with_changes(plan.run, first.changes)
    )
    acted(finishes, of=reached.plan, resuming=True)
    lesson = learnt.recall(plan)
    assert lesson.changes == first.changes
    assert (lesson.cause, lesson.phase) == (LOGITS.cause.value, LOGITS.phase)


def test_every_plan_on_the_way_down_has_its_lesson(acted, plan):
    _, (first, second, _) = acted(fails(OUT_OF_MEMORY), fails(OUT_OF_MEMORY), finishes)
    last = {**first.changes, **second.changes}
    assert with_changes(plan.run, learnt.recall(plan).changes) == with_changes(plan.run, last)
    architecture = resolve_architecture(plan.run)
    between = Below(plan, architecture, keep_stage=True).with_run(with_changes(plan.run, first.changes)).plan
    assert plan_id(between.run) == second.plan
    assert learnt.recall(between).changes == second.changes


def test_a_plan_of_the_users_between_teaches_nothing_of_the_one_before(acted, plan):
    acted(fails(OUT_OF_MEMORY), fails(TrainingFailed("interrupted", INTERRUPTED_CODE)))
    own = replace(plan, run=with_changes(plan.run, {"micro_batch_size": 1, "grad_accum_steps": 8}))
    acted(finishes, of=own, resuming=True)
    assert learnt.recall(plan) is None


def test_a_step_taken_anew_in_place_is_learnt_from(acted, plan):
    def halves(_plan, _run_dir, listen):
        listen({"event": "halved", "step": 4, "micro_batch_size": 3})

    acted(halves)
    lesson = learnt.recall(plan)
    assert lesson.changes == {"micro_batch_size": 2, "grad_accum_steps": 4}
    assert lesson.phase == "step 5"
