"""The planner's choice simulated, and what changes give."""

from __future__ import annotations

import pytest

from vramplan.errors import LegalityError
from vramplan.facts.devices import resolve_node
from vramplan.facts.resolve import resolve_architecture
from vramplan.search.choose import search
from vramplan.simulate.asked import close_run, node_to_simulate, request_on
from vramplan.simulate.changes import explain
from vramplan.simulate.request import simulate_jobs
from vramplan.simulate.verify import make_verified_plan
from vramplan.spec.load import run_from_mapping

TINY = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 4000,
    "max_position_embeddings": 512,
}


def asked(**fields):
    return run_from_mapping(
        {
            "model": "tiny",
            "model_config_fields": TINY,
            "seq_len": 256,
            "hardware": {"gpu": "rtx4090", "gpus_per_node": 4},
            "zero": {"reduce_bucket_size": 1_000_000},
            **fields,
        }
    )


def test_the_search_goes_on_past_what_another_witness_refused():
    run = asked()
    node, architecture = resolve_node(run.hardware), resolve_architecture(run)
    first = search(run, node, architecture)
    second = search(run, node, architecture, excluded={first.best.candidate: "the simulation ran out"})
    assert second.fits
    assert second.best.candidate != first.best.candidate
    assert "the simulation ran out" in [each.reason for each in second.refused]


def test_the_choice_is_simulated():
    run = asked(micro_batch_size=2)
    verified = make_verified_plan(run, resolve_node(run.hardware), resolve_architecture(run))
    assert verified.found.fits
    assert verified.text.startswith("verified by simulation")
    predicted = verified.plan.prediction.allocated_peak_bytes
    assert verified.found.allocated_peak_bytes == pytest.approx(predicted, rel=0.01)


def test_what_is_illegal_is_refused_though_nothing_is_left_open():
    run = asked(
        method="lora",
        layout={"dp": 2, "tp": 2},
        micro_batch_size=1,
        grad_accum_steps=1,
        activation_checkpointing="none",
        zero={"stage": 1, "offload_optimizer": "none", "offload_param": "none"},
    )
    with pytest.raises(LegalityError, match=r"layout\.tp splits linears by their names"):
        close_run(run, node_to_simulate(run))


def test_a_rate_for_each_layer_is_simulated():
    run = asked(
        micro_batch_size=1,
        grad_accum_steps=1,
        activation_checkpointing="full",
        layout={"dp": 4},
        zero={"stage": 3, "reduce_bucket_size": 100_000, "offload_optimizer": "none", "offload_param": "none"},
        retain={"layer_lr_decay": 0.8},
    )
    closed = close_run(run, node_to_simulate(run))
    ((_, found),) = simulate_jobs([closed.request()])
    assert closed.estimate is not None
    estimated = {phase.phase: phase.peak_bytes for phase in closed.estimate.phases}
    steps = [phase for phase in found.phases if phase.phase.endswith("optimizer_step")]
    assert len(steps) == 2
    for phase in steps:
        assert phase.peak_bytes == pytest.approx(estimated[phase.phase], rel=0.01), phase.phase


def test_each_change_is_simulated():
    run = asked(micro_batch_size=2, activation_checkpointing="none", zero={"stage": 1, "reduce_bucket_size": 100_000})
    answer = explain(close_run(run, node_to_simulate(run)), parallel=2)
    assert answer.found.error is None
    estimated = answer.closed.estimate
    assert estimated is not None
    simulated = {phase.phase: phase.peak_bytes for phase in answer.found.phases}
    played = [
        phase for phase in estimated.phases if phase.phase in simulated
    ]  # evaluation and saving are the trainer's
    assert len(played) == len(simulated)
    for phase in played:
        if phase.phase != "model_load":  # built on the host, where the simulated device is a GPU
            assert phase.peak_bytes == pytest.approx(simulated[phase.phase], rel=0.02), phase.phase
    changed = {change.name: found for change, found in answer.changes}
    assert {"checkpointing full", "ZeRO 2", "ZeRO 3", "optimizer on the CPU"} <= set(changed)
    assert all(found.error is None for found in changed.values())
    before = answer.found.allocated_peak_bytes
    assert changed["chunked loss"].allocated_peak_bytes < before
    assert changed["checkpointing full"].allocated_peak_bytes < before
    assert changed["micro-batch 1, accumulated twice as often"].allocated_peak_bytes < before


def test_a_tied_head_is_split_among_ranks():
    """DeepSpeed's loss asks the other ranks of a tensor-parallel group for their shares of the vocabulary."""
    tied = {**TINY, "tie_word_embeddings": True}
    run = asked(
        model_config_fields=tied,
        layout={"dp": 2, "tp": 2},
        micro_batch_size=1,
        grad_accum_steps=1,
        activation_checkpointing="none",
        zero={"stage": 1, "offload_optimizer": "none", "offload_param": "none"},
    )
    ((_, found),) = simulate_jobs([request_on(run, resolve_node(run.hardware))])
    assert found.error is None
    assert found.phases[-1].phase == "step2.micro1.optimizer_step"
