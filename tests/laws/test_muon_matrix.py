"""Estimator against simulator under Muon: every stage, formats that gradients have, adapters, experts, accumulation."""

from __future__ import annotations

import pytest

from vramplan.facts.devices import resolve_node
from vramplan.facts.resolve import resolve_architecture
from vramplan.memory.estimate import estimate
from vramplan.simulate.asked import request_on
from vramplan.simulate.request import simulate_jobs
from vramplan.spec.run import RunSpec

from support.matrix import Case, beyond_the_bar

CASES = (
    "llama.13/full/0/none/sdpa/bf16/none/cuda/4/2/1/adamw/none/small/let go",
    "gpt2.0/full/1/none/sdpa/bf16/none/cuda/4/2/2/adamw/none/small/let go",
    "qwen3_moe.24/full/1/none/sdpa/fp32/none/cpu/4/2/1/adamw/none/small/let go",
    "mistral.15/lora/1/none/sdpa/bf16/none/cuda/4/2/1/adamw/none/small/let go",
    "llama.13/full/2/none/sdpa/bf16-autocast/none/cuda/4/2/1/adamw/none/small/let go",
    "llama.13/full/2/full/sdpa/fp16/none/cuda/1/2/2/adamw/none/small/let go",
    "llama.13/full/3/none/sdpa/bf16/none/cuda/4/2/2/adamw/none/small/let go",
    "qwen2.18/full/3/none/sdpa/fp16/none/cuda/1/2/1/adamw/none/small/let go",
    "mistral.15/lora/3/none/sdpa/bf16/none/cuda/4/2/1/adamw/none/small/let go",
)
"""In the words of ``Case.key``, but for the optimizer."""


def _run(key: str, decay: float = 1.0) -> RunSpec:
    run = Case.parse(key).run()
    zero = {**run.zero.model_dump(), "reduce_scatter": run.zero.stage != 3}
    fields = {"optimizer": {"kind": "muon"}, "zero": zero, "retain": {"layer_lr_decay": decay}}
    return RunSpec.model_validate({**run.model_dump(), **fields})


@pytest.mark.slow
def test_estimate_and_simulation_agree_under_muon():
    runs = {key: _run(key) for key in CASES}
    runs |= {f"{key} by layer": _run(key, decay=0.9) for key in (CASES[0], CASES[4], CASES[6])}
    nodes = {key: resolve_node(run.hardware) for key, run in runs.items()}
    failed = []
    requests = [request_on(run, nodes[key], key=key) for key, run in runs.items()]
    for key, result in simulate_jobs(requests, parallel=2):
        run = runs[key]
        found = estimate(run, nodes[key], resolve_architecture(run), rank=0)
        phases = [phase.as_phase_bytes() for phase in result.phases]
        failed += [f"{key}: {each}" for each in ([result.error] if result.error else beyond_the_bar(found, phases)[:2])]
    assert not failed, "\n".join(failed)
