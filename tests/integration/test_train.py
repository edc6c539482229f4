"""Training for real on two gloo ranks: every stage and method, and what must not depend on how the batch is cut."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from vramplan.measure.compare import compare_file
from vramplan.measure.record import read_records
from vramplan.measure.run_dir import RunDir

from support.tiny_model import save_tiny_model
from support.training import events_of, losses, train, write_spec

pytestmark = pytest.mark.ranks

STAGES = {"full": (0, 2, 3), "lora": (0, 3)}
"""Adapters under ZeRO-2 train in ``test_resume.py``, and those of other kinds below."""
RUNS = [(stage, method) for method, stages in STAGES.items() for stage in stages]


@pytest.mark.parametrize(("stage", "method"), RUNS)
def test_the_loss_falls(finished_run, stage, method):
    found = losses(finished_run(stage, method))
    assert list(found) == [1, 2, 3, 4, 5, 6]
    assert found[6] < found[1] - (0.5 if method == "full" else 0.05)
    (evaluation,) = events_of(finished_run(stage, method), "evaluation")
    assert evaluation["loss"] < found[1]
    assert evaluation["perplexity"] == pytest.approx(math.exp(evaluation["loss"]))


@pytest.mark.parametrize("method", STAGES)
def test_the_stage_does_not_change_the_training(finished_run, method):
    reference = losses(finished_run(0, method))
    for stage in STAGES[method][1:]:
        assert losses(finished_run(stage, method)) == pytest.approx(reference, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("reentrant", [False, True])
def test_what_is_recomputed_and_how_the_loss_is_taken_change_no_loss(finished_run, tiny_model, tmp_path, reentrant):
    """Every second layer is recomputed, and the loss DeepSpeed's chunked one; the bytes are those predicted."""
    recomputed = {"activation_checkpointing": "full", "checkpoint_every": 2, "checkpoint_reentrant": reentrant}
    spec = write_spec(tmp_path / "spec.yaml", tiny_model, 2, loss="chunked", **recomputed)
    assert train(spec, "-o", tmp_path / "run").returncode == 0
    assert losses(tmp_path / "run") == pytest.approx(losses(finished_run(2, "full")), rel=1e-5)
    (compared,) = compare_file(tmp_path / "run" / "record.jsonl").records
    assert compared.error_frac == pytest.approx(0, abs=0.01)


def test_how_the_batch_is_cut_does_not_change_the_losses(finished_run, tiny_model, tmp_path):
    """Into one micro-batch of 4 and into two of 2."""
    spec = write_spec(tmp_path / "spec.yaml", tiny_model, 2, micro_batch_size=4, grad_accum_steps=1)
    assert train(spec, "-o", tmp_path / "whole").returncode == 0
    halves = finished_run(2, "full")
    assert losses(halves) == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
    samples = [[event["samples"] for event in events_of(each, "step")] for each in (halves, tmp_path / "whole")]
    assert samples[0] == samples[1]


@pytest.mark.slow
def test_the_number_of_ranks_does_not_change_the_training(tiny_model, tmp_path):
    """By SGD without clipping, which unlike Adam feels a gradient that is too large or too small by a factor."""
    by_ranks = {}
    for ranks in (1, 2):
        spec = write_spec(
            tmp_path / "spec.yaml",
            tiny_model,
            2,
            hardware={"gpu": "cpu", "gpus_per_node": ranks},
            grad_accum_steps=4 // ranks,
            optimizer={"kind": "sgd", "lr": 1.0},
            training={"max_grad_norm": 0, "max_steps": 4},
        )
        assert train(spec, "-o", tmp_path / f"run{ranks}").returncode == 0
        by_ranks[ranks] = losses(tmp_path / f"run{ranks}")
    assert by_ranks[2] == pytest.approx(by_ranks[1], rel=1e-5)
    assert by_ranks[2][4] < by_ranks[2][1] - 0.2


@pytest.mark.parametrize(
    ("stage", "precision", "closeness"),
    [
        (0, "bf16", 1e-3),
        pytest.param(1, "bf16", 1e-3, marks=pytest.mark.slow),
        pytest.param(2, "bf16-autocast", 1e-3, marks=pytest.mark.slow),
    ],
)
def test_half_precision_trains_as_single_does(finished_run, tiny_model, tmp_path, stage, precision, closeness):
    """Stage 0 is the hard one: DeepSpeed's wrapper there makes a step of its own at the start."""
    spec = write_spec(tmp_path / "spec.yaml", tiny_model, stage, precision=precision)
    assert train(spec, "-o", tmp_path / "run").returncode == 0
    assert losses(tmp_path / "run") == pytest.approx(losses(finished_run(0, "full")), rel=closeness)


def test_the_record_is_of_two_steps_and_of_the_first_of_what_comes_between_them(finished_run):
    run_dir = RunDir(finished_run(2, "full"))
    (record,) = read_records(run_dir.record)
    assert [phase.phase for phase in record.measured.phases] == [
        "model_load",
        "engine_init",
        *(
            f"step{step}.{phase}"
            for step in (1, 2)
            for phase in (
                "micro1.forward",
                "micro1.backward",
                "micro2.forward",
                "micro2.backward",
                "micro2.optimizer_step",
            )
        ),
        "save",  # after the third step; the only evaluation comes after the last
        "evaluation",
        "export",
    ]
    passes = record.spec.passes
    assert (passes.evaluation.size, passes.pinned.size) == (2, 1)
    assert passes.exported
    assert not passes.resumed
    assert not passes.saved_after_evaluation
    assert record.measured.outcome == "ok"
    assert record.measured.numel_total == record.measured.numel_trainable
    assert record.spec.zero.stage == 2
    assert record.env["backend"] == "gloo"
    predicted = json.loads(run_dir.record.read_text())["predicted"]
    assert predicted["allocated_peak_bytes"] > 0


def test_the_rate_warms_up_and_decays(finished_run):
    rates = [event["lr"] for event in events_of(finished_run(0, "full"), "step")]
    assert rates[0] == pytest.approx(0.5e-2)  # a warm-up of two steps
    assert rates[1] == rates[2] == pytest.approx(1e-2)
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert rates[-1] < 0.2e-2


def test_tensorboard_shows_the_losses(finished_run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_dir = finished_run(0, "full")
    board = EventAccumulator(str(RunDir(run_dir).tensorboard)).Reload()
    shown = {point.step: point.value for point in board.Scalars("train/loss")}
    assert shown == pytest.approx(losses(run_dir), rel=1e-6)


def test_what_was_trained_can_be_loaded_as_usual(finished_run, tiny_model):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    for stage in STAGES["full"]:
        full = AutoModelForCausalLM.from_pretrained(RunDir(finished_run(stage, "full")).model, use_safetensors=True)
        assert held_out_loss(full, finished_run(stage, "full")) == pytest.approx(
            evaluated(finished_run(stage, "full")), rel=1e-4
        )
    for stage in STAGES["lora"]:
        directory = RunDir(finished_run(stage, "lora")).adapter
        adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), str(directory))
        assert held_out_loss(adapted, finished_run(stage, "lora")) == pytest.approx(
            evaluated(finished_run(stage, "lora")), rel=1e-4
        )
        assert AutoTokenizer.from_pretrained(directory).chat_template
    assert held_out_loss(base, finished_run(0, "full")) > evaluated(finished_run(0, "full")) + 0.3


def test_the_trained_model_answers_after_it_was_reloaded_and_merged(tiny_model, tmp_path):
    from transformers import AutoModelForCausalLM

    spec = write_spec(
        tmp_path / "spec.yaml",
        tiny_model,
        0,
        "lora",
        training={"max_steps": 2, "merge_adapters": True, "sample_tokens": 5},
    )
    done = train(spec, "-o", tmp_path / "run", "--sample", "How many?")
    assert done.returncode == 0, done.stderr
    (event,) = events_of(tmp_path / "run", "sample")
    assert event["question"] == "How many?"
    assert event["answer"] in done.stdout
    merged = AutoModelForCausalLM.from_pretrained(RunDir(tmp_path / "run").model, use_safetensors=True)
    assert held_out_loss(merged, tmp_path / "run") == pytest.approx(evaluated(tmp_path / "run"), rel=1e-4)
    assert "fine-tuned (lora, merged)" in (RunDir(tmp_path / "run").model / "README.md").read_text()


@pytest.mark.parametrize(
    ("tied", "stage", "saved"),
    [
        pytest.param(True, 2, ["lm_head"], id="one matrix"),
        pytest.param(False, 3, ["embed_tokens", "lm_head"], id="two, ZeRO-3", marks=pytest.mark.slow),
    ],
)
def test_token_table_and_head_are_trained_whole_beside_adapters(tied, stage, saved, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = save_tiny_model(tmp_path / "model", tie_word_embeddings=tied)
    spec = write_spec(
        tmp_path / "spec.yaml",
        model,
        stage,
        {"kind": "lora", "r": 8, "modules_to_save": saved},
        training={"max_steps": 3, "merge_adapters": True},
    )
    done = train(spec, "-o", tmp_path / "run")
    assert done.returncode == 0, done.stdout + done.stderr
    run_dir = RunDir(tmp_path / "run")
    base = AutoModelForCausalLM.from_pretrained(model)
    before = base.get_input_embeddings().weight.clone()
    reloaded = PeftModel.from_pretrained(base, str(run_dir.adapter))
    after = reloaded.get_input_embeddings().weight
    assert (after - before).abs().max() > 1e-3
    assert (reloaded.get_output_embeddings().weight is after) == tied
    merged = AutoModelForCausalLM.from_pretrained(run_dir.model, use_safetensors=True)
    for found in (reloaded, merged):
        assert held_out_loss(found, tmp_path / "run") == pytest.approx(evaluated(tmp_path / "run"), rel=1e-4)
    (record,) = compare_file(tmp_path / "run" / "record.jsonl").records
    assert abs(record.error_frac) < 0.01


def evaluated(run_dir: Path) -> float:
    return float(events_of(run_dir, "evaluation")[-1]["loss"])


def held_out_loss(model, run_dir: Path) -> float:
    """The held-out loss, computed here sample by sample."""
    import torch
    from transformers import AutoTokenizer

    from vramplan.data.dataset import load_data
    from vramplan.search.plan import Plan

    run = Plan.load(RunDir(run_dir).plan).run
    samples = load_data(run, AutoTokenizer.from_pretrained(run.model)).held_out
    total, count = 0.0, 0
    for sample in samples:
        ids, trained = torch.from_numpy(sample.ids), torch.from_numpy(sample.trained)
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0, :-1].double()
        nll = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
        total, count = total + float(nll[trained[1:]].sum()), count + int(trained[1:].sum())
    return total / count


@pytest.mark.parametrize(
    ("method", "stage", "precision"),
    [
        pytest.param({"kind": "qlora", "r": 8}, 2, "bf16", id="qlora"),
        pytest.param({"kind": "lora", "r": 8, "use_dora": True}, 2, "bf16", id="dora", marks=pytest.mark.slow),
        pytest.param({"kind": "qlora", "r": 8}, 3, "bf16", id="qlora-zero3", marks=pytest.mark.slow),
        pytest.param({"kind": "qlora", "r": 8}, 3, "fp32", id="qlora-zero3-fp32", marks=pytest.mark.slow),
        pytest.param({"kind": "lora", "r": 8, "use_dora": True}, 3, "bf16", id="dora-zero3", marks=pytest.mark.slow),
    ],
)
def test_adapters_of_other_kinds_train_evaluate_and_take_what_was_predicted(
    method, stage, precision, tiny_model, tmp_path
):
    spec = write_spec(tmp_path / "spec.yaml", tiny_model, stage, method=method, precision=precision)
    done = train(spec, "-o", tmp_path / "run")
    assert done.returncode == 0, done.stdout + done.stderr
    found = losses(tmp_path / "run")
    assert found[6] < found[1]
    (record,) = compare_file(tmp_path / "run" / "record.jsonl").records
    assert abs(record.error_frac) < 0.01
