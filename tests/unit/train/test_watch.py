"""What evaluations decide: the best step, and the run's early end."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from vramplan.errors import SpecError
from vramplan.spec.check import check_run
from vramplan.spec.load import run_from_mapping
from vramplan.train.loop import Loop
from vramplan.train.watch import Watch

EARLY = {"early_stop": {"set": "general", "max_rise_frac": 0.1}}


def watch(training, retain, **losses) -> Watch:
    """Losses of each set at steps 0, 10, 20 and so on."""
    data = {"eval_sets": {"general": "builtin:arithmetic"}}
    found = Watch(run_from_mapping({"model": "x", "data": data, "training": training, "retain": retain}))
    for name, values in losses.items():
        for number, loss in enumerate(values):
            found.add(name, 10 * number, loss)
    return found


def test_the_best_step_is_the_lowest_after_training_began():
    assert watch({"best_on": "held_out"}, {}, held_out=[0.5, 3.0, 2.0, 2.0, 2.5]).best_step == 20
    assert watch({"best_on": "held_out"}, {}, held_out=[0.5]).best_step is None
    assert watch({}, {}, held_out=[3.0, 2.0]).best_step is None


def test_a_step_that_forgot_more_than_is_allowed_is_not_the_best():
    """log(1.1) is 0.095."""
    forgot = watch({"best_on": "held_out"}, EARLY, held_out=[4, 3, 2, 1], general=[2, 2.05, 2.09, 2.3])
    assert forgot.best_step == 20
    assert forgot.stop_reason == "retain.early_stop on general"
    none_is_allowed = watch({"best_on": "held_out"}, EARLY, held_out=[4, 3, 2], general=[2, 2.3, 2.3])
    assert none_is_allowed.best_step == 20


def test_a_best_step_that_is_worse_than_no_training_is_told():
    on = {"best_on": "held_out"}
    worse = watch(on, {}, held_out=[2.0, 2.5, 2.25, 3.0])
    assert worse.worse_than_before == (
        "every checkpoint is worse on held_out than the model before training: a loss of 2.2500 against 2.0000"
    )
    assert watch(on, {}, held_out=[2.0, 2.5, 1.75]).worse_than_before is None
    assert watch(on, {}, held_out=[2.0]).worse_than_before is None
    assert watch({}, {}, held_out=[2.0, 2.5]).worse_than_before is None
    unknown = watch(on, {})
    unknown.add("held_out", 10, 2.5)
    assert unknown.worse_than_before is None
    forgot = watch(on, EARLY, held_out=[2.0, 2.5, 1.5], general=[2, 2, 2.3])
    assert forgot.worse_than_before is not None
    assert forgot.worse_than_before.startswith(
        "the best checkpoint that retain.early_stop allows, of step 10, is worse"
    )


def test_patience_ends_a_run_that_no_longer_gets_better():
    training = {"best_on": "held_out", "patience": 2}
    assert watch(training, {}, held_out=[4, 3, 2, 2.1]).stop_reason is None
    assert watch(training, {}, held_out=[4, 3, 2, 2.1, 2.0]).stop_reason == "training.patience on held_out"
    assert watch(training, {}, held_out=[4, 3, 2, 2.1, 1.9]).stop_reason is None
    assert watch({"best_on": "held_out"}, {}, held_out=[4, 3, 9, 9, 9]).stop_reason is None


def test_what_watches_evaluations_needs_some():
    sets = {"data": {"eval_sets": {"general": "builtin:arithmetic"}}}
    for fields in ({"training": {"patience": 2, "best_on": "held_out"}}, {"retain": EARLY, **sets}):
        with pytest.raises(SpecError, match=r"set training\.eval_every"):
            check_run(run_from_mapping({"model": "x", **fields}))


def test_patience_without_a_set_is_refused():
    with pytest.raises(SpecError, match=r"training\.patience needs training\.best_on"):
        check_run(run_from_mapping({"model": "x", "training": {"patience": 2}}))


@pytest.mark.parametrize(("losses", "said"), [([2.0, 2.5], 1), ([2.0, 1.5], 0)])
def test_the_run_notes_a_best_checkpoint_that_is_worse_than_no_training(losses, said):
    events = []
    metrics = SimpleNamespace(event=lambda kind, **fields: events.append({"event": kind, **fields}))
    loop = SimpleNamespace(watch=watch({"best_on": "held_out"}, {}, held_out=losses), metrics=metrics, steps_done=10)
    Loop.return_to_best(loop)
    assert [event["event"] for event in events] == ["best", *["note"] * said]
    assert all("worse on held_out than the model before training" in event["text"] for event in events[1:])
