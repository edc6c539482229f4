"""Estimator against simulator for every method against forgetting: springs, the Fisher diagonal, KL to the base."""

from __future__ import annotations

import pytest

from vramplan.facts.devices import resolve_node
from vramplan.facts.resolve import resolve_architecture
from vramplan.memory.estimate import estimate
from vramplan.memory.ledger import Estimate, PhaseBytes
from vramplan.retain.registry import METHODS
from vramplan.simulate.asked import request_on
from vramplan.simulate.request import simulate_jobs
from vramplan.spec.retain import RetainSpec

from support.matrix import Case, beyond_the_bar

FIELDS = {method.module: method.fields["retain"] for method in METHODS if "retain" in method.fields}
FIELDS["ewc, many samples"] = {"ewc": FIELDS["ewc"]["ewc"] | {"samples": 64}}
FIELDS["both"] = FIELDS["l2sp"] | FIELDS["ewc, many samples"]
QUICK = (
    ("kl", "mistral.15/lora/3/none/sdpa/bf16/none/cuda/4/2/2/adamw/none/small/let go"),
    ("both", "mistral.15/full/2/none/sdpa/bf16/none/cuda/4/2/2/adamw/none/small/let go"),
    ("both", "mistral.15/full/1/full/sdpa/bf16/none/cuda/4/1/2/adamw/none/small/let go"),
    ("layer_lr", "llama.13/full/0/none/sdpa/bf16/none/cuda/4/2/1/adamw_torch/none/small/let go"),
)
CASES = (
    ("kl", "mistral.15/full/0/none/sdpa/bf16/none/cuda/4/2/2/adamw/none/small/let go"),
    ("kl", "mistral.15/full/3/full/sdpa/bf16-autocast/none/cuda/4/2/1/adamw/both/small/let go"),
    ("kl", "mistral.15/full/2/full/sdpa/bf16/padded/cuda/4/1/1/adamw/optimizer/small/let go"),
    ("kl", "llama.13/expanded/2/none/sdpa/fp32/none/cpu/1/2/1/adamw/none/small/let go"),
    ("kl", "mistral.15/lora/1/none/sdpa/bf16/none/cuda/4/2/2/adamw/none/small/kept"),
    ("l2sp", "mistral.15/full/3/none/sdpa/bf16/none/cuda/4/2/2/adamw/none/small/let go"),
    ("l2sp", "mistral.15/full/1/none/sdpa/fp32/none/cpu/4/2/1/adamw/none/small/let go"),
    ("l2sp", "mistral.15/full/0/full/sdpa/bf16/none/cuda/1/1/2/adamw_torch/none/small/let go"),
    ("l2sp", "mistral.15/full/3/full/sdpa/bf16/none/cuda/4/2/1/adamw/both/small/let go"),
    ("ewc", "mistral.15/lora/0/none/sdpa/bf16/none/cuda/4/2/2/adamw/none/small/let go"),
    ("ewc", "mistral.15/full/3/none/sdpa/bf16-autocast/none/cuda/4/2/2/adamw/none/small/let go"),
    ("ewc", "mistral.15/full/1/none/sdpa/fp32/none/cpu/4/2/1/adamw/none/small/let go"),
    ("ewc, many samples", "mistral.15/full/2/full/sdpa/bf16/none/cuda/4/2/1/adamw/optimizer/small/let go"),
    ("layer_lr", "mistral.15/full/2/none/sdpa/bf16/none/cuda/4/2/1/adamw/none/small/let go"),
    ("layer_lr", "llama.13/full/3/none/sdpa/fp32/none/cpu/4/2/1/adamw_torch/none/small/let go"),
    ("layer_lr", "llama.13/full/2/none/sdpa/bf16/none/cpu/4/2/1/adamw_torch/optimizer/small/let go"),
    ("layer_lr", "llama.13/full/0/none/sdpa/fp32/none/cuda/4/2/1/adamw_torch/none/small/let go"),
)
"""(method, the run in the words of ``Case.key``)."""


def prepared(name: str, key: str) -> tuple[Estimate, object]:
    run = Case.parse(key).run().model_copy(update={"retain": RetainSpec.model_validate(FIELDS[name])})
    node = resolve_node(run.hardware)
    return estimate(run, node, resolve_architecture(run), rank=0), request_on(run, node, key=f"{name} {key}")


def check(cases):
    found = {f"{name} {key}": prepared(name, key) for name, key in cases}
    failed = []
    for key, result in simulate_jobs((request for _, request in found.values()), parallel=2):
        assert result.error is None, (key, result.error)
        estimated = found[key][0]
        known = {phase.phase for phase in estimated.phases}
        # anchoring alone takes what is kept: no phase of the estimate, but where the Fisher diagonal is sampled
        phases = [PhaseBytes(p.phase, p.peak_bytes, p.end_bytes) for p in result.phases if p.phase in known]
        assert {phase.phase for phase in phases} == known
        failed += [f"{key}: {each}" for each in beyond_the_bar(estimated, phases)[:3]]
    assert not failed, "\n".join(failed)


def test_estimate_and_simulation_agree():
    check(QUICK)


@pytest.mark.slow
def test_estimate_and_simulation_agree_for_every_method():
    check(CASES)
