"""fp32 weights that ZeRO-3 splits on a CPU: simulation, measurement and estimate of a user's run are of four bytes."""

from __future__ import annotations

import pytest

from vramplan.facts.devices import resolve_node
from vramplan.facts.resolve import resolve_architecture
from vramplan.measure.bench import run_jobs
from vramplan.measure.record_spec import record_spec_from_run
from vramplan.memory.estimate import estimate
from vramplan.simulate.asked import request_on
from vramplan.simulate.request import layout_of, simulate_jobs
from vramplan.spec.load import run_from_mapping

CONFIG = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 2000,
    "max_position_embeddings": 256,
}


def run_of(precision, method="full", **fields):
    return run_from_mapping(
        {
            "model": "tiny",
            "model_config_fields": CONFIG,
            "method": {"kind": method},
            "precision": precision,
            "seq_len": 128,
            "micro_batch_size": 2,
            "grad_accum_steps": 1,
            "activation_checkpointing": "none",
            "zero": {
                "stage": 3,
                "offload_optimizer": "none",
                "offload_param": "none",
                "reduce_bucket_size": 100_000,
                "stage3_prefetch_bucket_size": 100_000,
            },
            "layout": {"dp": 2},
            "hardware": {"gpu": "cpu", "gpus_per_node": 2, "memory_cap": "8GiB"},
            **fields,
        }
    )


def check(found, phases, rel):
    by_name = {phase.phase: phase for phase in phases}
    for phase in found.phases[1:]:  # not of loading: here from the config alone
        if phase.phase in by_name:
            assert phase.peak_bytes == pytest.approx(by_name[phase.phase].peak_bytes, rel=rel), phase.phase
            assert phase.end_bytes == pytest.approx(by_name[phase.phase].end_bytes, rel=rel), phase.phase


@pytest.mark.parametrize(("precision", "method"), [("fp32", "full"), ("bf16-autocast", "full"), ("fp32", "lora")])
def test_simulation_and_estimate_agree(precision, method):
    run = run_of(precision, method)
    node = resolve_node(run.hardware)
    ((_, simulated),) = simulate_jobs([request_on(run, node)])
    assert simulated.error is None
    loaded = simulated.phases[0].end_bytes
    assert loaded >= 4 * simulated.numel_total / 2
    check(estimate(run, node, resolve_architecture(run), rank=0), simulated.phases, 0.01)


def test_what_bench_measures_agrees(tmp_path):
    run = run_of("fp32")
    job = record_spec_from_run(run, CONFIG, layout_of(run), "fp32").model_copy(update={"keep_outputs": False})
    (record,) = run_jobs([job], tmp_path / "records.jsonl")
    assert (record.measured.outcome, record.measured.error) == ("ok", None)
    found = estimate(run, resolve_node(run.hardware), resolve_architecture(run), rank=0, managed=True)
    loaded = record.measured.phases[0].allocated_end_bytes
    assert loaded >= 4 * record.measured.numel_total / 2
    measured = {phase.phase: phase.allocated_peak_bytes for phase in record.measured.phases if phase.is_step}
    assert len(measured) == 6
    for phase in found.phases:
        if phase.phase in measured:
            assert phase.peak_bytes == pytest.approx(measured[phase.phase], rel=0.01), phase.phase
