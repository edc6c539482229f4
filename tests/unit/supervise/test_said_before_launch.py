"""What is wrong with a spec is said in its own words, before anything runs."""

from typing import get_args

import pytest

from vramplan.errors import LegalityError, SpecError, VramplanError
from vramplan.facts.devices import resolve_node
from vramplan.facts.resolve import resolve_architecture
from vramplan.memory.from_run import job_from_run
from vramplan.search.fit import fit_run
from vramplan.search.planner import make_plan
from vramplan.spec.load import run_from_mapping
from vramplan.spec.run import Precision
from vramplan.supervise.supervisor import check_before_launch

MODEL = {"model": "Qwen/Qwen2.5-0.5B"}


@pytest.mark.parametrize(
    ("optimizer", "sentence"),
    [
        ({"betas": [1.5, 0.9]}, r"optimizer\.betas.* must be less than 1"),
        ({"betas": [0.9]}, r"optimizer\.betas has too few values"),
        ({"betas": [0.9, 0.99, 0.999]}, r"optimizer\.betas is .* at most 2"),
        ({"eps": -1}, r"optimizer\.eps is -1 but must be at least 0"),
        ({"lr": float("inf")}, r"optimizer\.lr is inf but must be a finite number"),
    ],
)
def test_numbers_that_no_optimizer_takes(optimizer, sentence):
    with pytest.raises(SpecError, match=sentence):
        run_from_mapping({**MODEL, "optimizer": optimizer})


def test_a_key_of_another_method_is_said_to_be_one():
    with pytest.raises(SpecError, match=r"method\.fp32_norms is no key of the kind that method is"):
        run_from_mapping({**MODEL, "method": {"kind": "full", "fp32_norms": True}})


def test_a_name_as_a_pattern_of_modules_is_told_to_be_a_list():
    run = run_from_mapping(
        {
            **MODEL,
            "method": {"kind": "lora", "target_modules": "q_proj"},
            "seq_len": 64,
            "micro_batch_size": 1,
            "grad_accum_steps": 1,
            "activation_checkpointing": "none",
            "zero": {"stage": 1},
            "hardware": {"gpu": "rtx4090"},
        }
    )
    with pytest.raises(VramplanError, match=r"write \[q_proj\]"):
        job_from_run(run, resolve_node(run.hardware), resolve_architecture(run))


def test_a_layout_that_is_not_trained_is_refused_before_anything_starts():
    run = run_from_mapping(
        {
            "model": "meta-llama/Llama-3.1-8B",
            "layout": {"dp": 1, "tp": 2},
            "seq_len": 64,
            "hardware": {"gpu": "h100-80gb", "gpus_per_node": 2},
        }
    )
    plan = make_plan(run, resolve_node(run.hardware), resolve_architecture(run))
    with pytest.raises(LegalityError, match="tp 2"):
        check_before_launch(plan)


def test_formats_that_are_not_trained_are_refused_before_anything_starts():
    hardware = {"gpu": "h100-80gb", "gpus_per_node": 2}
    run = run_from_mapping(
        {**MODEL, "precision": "bf16", "grad_accum_dtype": "fp32", "seq_len": 64, "hardware": hardware}
    )
    plan = make_plan(run, resolve_node(run.hardware), resolve_architecture(run))
    with pytest.raises(LegalityError, match="grad_accum_dtype: the trainer's checkpoints hold fp32 master weights"):
        check_before_launch(plan)


def test_weights_that_are_stored_in_8_bits_are_not_trained():
    config = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config |= {"intermediate_size": 96, "vocab_size": 128, "quantization_config": {"quant_method": "fp8"}}
    run = run_from_mapping({**MODEL, "model_config_fields": config, "seq_len": 64, "hardware": {"gpu": "h100-80gb"}})
    plan = make_plan(run, resolve_node(run.hardware), resolve_architecture(run))
    with pytest.raises(LegalityError, match="is stored in fp8; its bytes are those of weights that are written out"):
        check_before_launch(plan)


def test_every_precision_has_its_traffic():
    for precision in get_args(Precision):
        engine = "torch" if precision == "bf16-weights-autocast" else "deepspeed"
        run = run_from_mapping(
            {**MODEL, "precision": precision, "engine": engine, "seq_len": 64, "hardware": {"gpu": "h100-80gb"}}
        )
        assert make_plan(run, resolve_node(run.hardware), resolve_architecture(run)).run.precision == precision


def test_the_host_that_is_said_to_be_needed_is_the_least_that_does():
    run = run_from_mapping({**MODEL, "seq_len": 64, "hardware": {"gpu": "h100-80gb", "host_memory": "1GiB"}})
    found = fit_run(run, resolve_node(run.hardware), resolve_architecture(run))
    assert not found.estimate.fits
    (needed,) = [value for remedy in found.remedies for key, value in remedy.changes if key == "hardware.host_memory"]

    def fits(host_memory):
        given = run_from_mapping({**MODEL, "seq_len": 64, "hardware": {"gpu": "h100-80gb", "host_memory": host_memory}})
        return fit_run(given, resolve_node(given.hardware), resolve_architecture(given)).estimate.fits

    assert fits(needed)
    assert not fits(f"{int(needed.removesuffix('MiB')) - 1}MiB")
