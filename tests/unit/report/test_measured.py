from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from vramplan.cost.utilisation import Utilisation
from vramplan.measure.record import PhaseReading
from vramplan.memory.ledger import PhaseBytes
from vramplan.report.measured import PhaseRow, phase_rows, render_measured, train_peak_row
from vramplan.report.progress import TrainingView, step_figures

MIB = 2**20


def text_of(renderable) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(renderable)
    return console.file.getvalue()


def predicted(**peaks: int) -> list[PhaseBytes]:
    return [PhaseBytes(name.replace("__", "."), peak, 0) for name, peak in peaks.items()]


def measured(**peaks: int) -> list[PhaseReading]:
    return [PhaseReading(name.replace("__", "."), peak, 0) for name, peak in peaks.items()]


def test_rows_join_by_phase_and_keep_the_measured_order():
    rows = phase_rows(
        predicted(step1__micro1__forward=110, model_load=90), measured(model_load=100, step1__micro1__forward=100)
    )
    assert rows == [PhaseRow("model_load", 90, 100), PhaseRow("step1.micro1.forward", 110, 100)]
    assert [round(row.error_frac, 3) for row in rows] == [-0.1, 0.1]


def test_later_micro_batches_share_a_row_and_the_step_has_one():
    rows = phase_rows(
        predicted(step1__micro1__forward=1, step1__micro2__forward=5, step1__micro1__optimizer_step=2),
        measured(
            step1__micro1__forward=1,
            step1__micro2__forward=3,
            step1__micro3__forward=4,
            step1__micro3__optimizer_step=2,
        ),
    )
    assert [(row.phase, row.measured_bytes) for row in rows] == [
        ("step1.micro1.forward", 1),
        ("step1.micro2..3.forward", 4),
        ("step1.optimizer_step", 2),
    ]
    assert rows[2].predicted_bytes == 2


def test_a_phase_that_nobody_predicted_has_no_error():
    (row,) = phase_rows([], measured(resume=5))
    assert row.error_frac is None
    assert "-" in text_of(render_measured([], measured(resume=5)))


def test_the_deciding_figure_is_of_the_steps():
    rows = phase_rows(
        predicted(model_load=900, step1__micro1__forward=101, step2__micro1__forward=102),
        measured(model_load=900, step1__micro1__forward=100, step2__micro1__forward=204),
    )
    assert train_peak_row(rows) == PhaseRow("highest of the steps", 102, 204)
    shown = text_of(
        render_measured(predicted(step1__micro1__forward=3 * MIB), measured(step1__micro1__forward=2 * MIB))
    )
    assert "3.0 MiB" in shown
    assert "2.0 MiB" in shown
    assert "+50.0%" in shown


STEP = {
    "event": "step",
    "step": 3,
    "total_steps": 9,
    "loss": 1.25,
    "lr": 1e-4,
    "tokens_per_s": 1234.5,
    "memory_now": MIB,
    "memory_of": "tensors",
    "memory_peak": 2 * MIB,
    "memory_peak_of": "tensors",
    "applied": True,
}


def test_a_steps_figures_say_loss_rate_speed_and_memory():
    assert step_figures(STEP, 4 * MIB) == (
        "loss 1.2500  lr 1.00e-04  1,234 tokens/s  memory now 1.0 MiB (tensors), "
        "peak 2.0 MiB (tensors), 4.0 MiB of tensors predicted"
    )
    assert "now 1.0 MiB (the whole process), peak 2.0 MiB (tensors)" in step_figures(
        {**STEP, "memory_of": "process"}, MIB
    )
    assert "peak 2.0 MiB (the whole process)" in step_figures({**STEP, "memory_peak_of": "process"}, MIB)
    assert "step skipped" in step_figures({**STEP, "applied": False}, MIB)
    busy = step_figures(STEP, MIB, Utilisation(flops_per_token=1e9, peak_flops=4e12))
    assert "1,234 tokens/s (30.9% of peak FLOP/s)" in busy


def test_the_view_prints_lines_where_there_is_no_terminal(small_plan):
    console = Console(file=io.StringIO(), width=200)
    with TrainingView(small_plan, console) as view:
        view.on_event({"event": "phase", "phase": "model_load"})
        view.on_event({"event": "note", "text": "[39] rows were cut"})
        view.on_event({**STEP, "step": 1})
        view.on_event({"event": "evaluation", "step": 1, "loss": 1.0, "perplexity": 2.718})
        for step, perplexity in ((0, 2.5), (1, 2.75)):
            view.on_event({"event": "evaluation", "step": step, "set": "replay", "loss": 1.0, "perplexity": perplexity})
        view.on_event({"event": "something new"})
    lines = console.file.getvalue().splitlines()
    assert lines[0] == "note: [39] rows were cut"
    assert lines[1].startswith("step 1/9  loss 1.2500")
    assert lines[2] == "after step 1: held-out loss 1.0000, perplexity 2.72"
    assert lines[3] == "before training: replay loss 1.0000, perplexity 2.50"
    assert lines[4] == "after step 1: replay loss 1.0000, perplexity 2.75 (+10.0%)"


@pytest.mark.parametrize(("count", "said"), [(1, "(0 held out), 1 step"), (3, "(0 held out), 3 steps")])
def test_one_step_is_one_step(small_plan, count, said):
    console = Console(file=io.StringIO(), width=200)
    start = {"event": "start", "step": 0, "total_steps": count, "num_train": 9, "num_held_out": 0}
    with TrainingView(small_plan, console) as view:
        view.on_event({**start, "numel_trainable": 1, "numel_total": 2})
    assert console.file.getvalue().rstrip().endswith(said)


def test_what_a_resume_takes_is_predicted_of_resumed_runs_only(small_plan):
    phases = tuple(
        PhaseBytes(name, peak * MIB, 0)
        for name, peak in (("engine_init", 1), ("step1", 3), ("resume", 4), ("export", 4))
    )
    plan = replace(small_plan, prediction=replace(small_plan.prediction, phases=phases))
    console = Console(file=io.StringIO(), width=200)
    with TrainingView(plan, console) as view:
        view.on_event({**STEP, "step": 1})
        view.on_event({"event": "resumed", "step": 1, "path": "p"})
        view.on_event({**STEP, "step": 2})
    first, _, second = console.file.getvalue().splitlines()
    assert first.endswith("3.0 MiB of tensors predicted")
    assert second.endswith("4.0 MiB of tensors predicted")


def test_a_note_about_another_plan_brings_its_prediction(small_plan):
    console = Console(file=io.StringIO(), width=200)
    with TrainingView(small_plan, console) as view:
        view.on_event({"event": "note", "text": "starts with micro_batch_size 2", "predicted_bytes": 7 * MIB})
        view.on_event({**STEP, "step": 1})
    assert console.file.getvalue().splitlines()[1].endswith("7.0 MiB of tensors predicted")


def test_the_view_is_one_live_line_on_a_terminal(small_plan):
    console = Console(file=io.StringIO(), width=200, force_terminal=True)
    with TrainingView(small_plan, console) as view:
        view.on_event(
            {
                "event": "start",
                "step": 0,
                "total_steps": 9,
                "numel_trainable": 10,
                "numel_total": 20,
                "num_train": 5,
                "num_held_out": 1,
            }
        )
        view.on_event(STEP)
    shown = console.file.getvalue()
    assert "3/9" in shown
    assert "loss 1.2500" in shown


def test_says_what_is_predicted_of_smaller_batches_that_came():
    foreseen, seen = predicted(evaluation=2000 * MIB, save=100 * MIB), measured(evaluation=800 * MIB, save=100 * MIB)
    came = predicted(evaluation=803 * MIB, save=100 * MIB)
    assert "came, which were smaller: evaluation 803.0 MiB\n" in text_of(render_measured(foreseen, seen, came)) + "\n"
    assert "which were smaller" not in text_of(render_measured(foreseen, seen, foreseen))


def test_a_recovery_that_passes_a_damaged_checkpoint_over_says_what_is_repeated(small_plan):
    console = Console(file=io.StringIO(), width=200)
    told = {"event": "recovery", "reason": "killed", "changes": {}, "layout": "", "seconds_lost": 1.0}
    with TrainingView(small_plan, console) as view:
        view.on_event({**told, "from_step": 4, "steps_repeated": 1})
        view.on_event({"event": "resumed", "step": 2, "path": "p"})
        view.on_event({**told, "from_step": 4, "steps_repeated": 1})
        view.on_event({"event": "resumed", "step": 4, "path": "p"})
        view.on_event({**told, "from_step": 0, "steps_repeated": 3})
    lines = console.file.getvalue().splitlines()
    assert lines[2] == "goes on after step 2, from p; 3 steps to repeat in all"
    assert lines[5] == "goes on after step 4, from p"
    assert lines[7].startswith("recovery: begins again with the same plan; 3 steps to repeat")
