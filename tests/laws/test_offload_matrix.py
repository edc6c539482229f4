"""Estimator against simulator where states and weights are offloaded, on a GPU and on the CPU, and under hpZ."""

from __future__ import annotations

import pytest

from vramplan.facts.devices import resolve_node
from vramplan.facts.resolve import resolve_architecture
from vramplan.memory.estimate import estimate
from vramplan.memory.labels import PINNED
from vramplan.simulate.asked import request_on
from vramplan.simulate.request import simulate_jobs

from support.matrix import Case, Prepared, beyond_the_bar, prepare

CASES = (
    "mistral.15/full/3/none/sdpa/fp32/none/cuda/4/2/1/adamw/both/small/let go",
    "llama.13/expanded/3/none/sdpa/bf16/none/cuda/4/1/2/adamw/both/small/let go",
    "mistral.15/full/3/none/sdpa/bf16/none/cpu/1/2/2/adamw/both/small/kept",
    "mistral.15/full/2/none/sdpa/bf16/none/cuda/4/2/2/adamw/optimizer/small/let go",
    "llama.13/full/1/none/sdpa/bf16/none/cuda/4/1/2/adamw/optimizer/small/let go",
    "mistral.15/full/2/full/sdpa/bf16-autocast/none/cpu/1/2/1/adamw/optimizer/small/let go",
    "falcon.9/full/3/none/sdpa/bf16-autocast/none/cuda/4/2/1/adamw/both/default/let go",
)
"""Parts brought to the device, norms at the step, sums in the host's memory, gradients larger than the bucket (in the
words of ``Case.key``)."""


@pytest.mark.slow
def test_estimate_and_simulation_agree_with_offload():
    prepared = {key: prepare(Case.parse(key)) for key in CASES}
    found = {key: each for key, each in prepared.items() if isinstance(each, Prepared)}
    assert len(found) == len(CASES), prepared
    failed = []
    for key, result in simulate_jobs((each.request() for each in found.values()), parallel=2):
        beyond = [result.error] if result.error else beyond_the_bar(found[key].estimate, result)
        failed += [f"{key}: {each}" for each in beyond[:2]]
        if Case.parse(key)["device"] == "cpu":
            continue
        terms = found[key].estimate.host_terms
        host = sum(term.num_bytes for term in terms)
        if abs(host / result.host_peak_bytes - 1) > 0.02:
            failed.append(f"{key}: host {host:,} against {result.host_peak_bytes:,}")
        pinned = sum(term.num_bytes for term in terms if term.name in PINNED)
        if pinned != result.pinned_bytes:
            failed.append(f"{key}: pinned {pinned:,} against {result.pinned_bytes:,}")
    assert not failed, "\n".join(failed)


@pytest.mark.slow
def test_estimate_and_simulation_agree_under_hpz():
    run = Case.parse("mistral.15/full/3/none/sdpa/bf16/none/cuda/4/1/2/adamw/none/small/let go").run()
    run = run.model_copy(update={"zero": run.zero.model_copy(update={"hpz_partition_size": 2})})
    node = resolve_node(run.hardware)
    ((_, result),) = simulate_jobs([request_on(run, node)])
    assert not result.error
    assert not beyond_the_bar(estimate(run, node, resolve_architecture(run), rank=0), result)
