"""Model FLOPs utilisation against its definition."""

from __future__ import annotations

import pytest

from vramplan.cost.utilisation import utilisation
from vramplan.facts.device import Device, Node
from vramplan.facts.resolve import resolve_architecture
from vramplan.spec.layout import Layout
from vramplan.spec.run import RunSpec


def of(flops: float | None = 1e15, **fields: object):
    run = RunSpec.model_validate(
        {"model": "meta-llama/Llama-3.1-8B", "seq_len": 4096, "layout": Layout(dp=4), **fields}
    )
    return utilisation(run, Node(Device("gpu", "cuda", 1, 1, bf16_flops=flops), 8), resolve_architecture(run))


def test_it_is_what_the_definition_says_and_recomputation_does_not_raise_it():
    """PaLM's appendix B: 6 N + 12 L H Q T a token (all pairs of positions; causal kernels do half of them)."""
    weights, attention = 8_030_261_248 - 128_256 * 4096, 12 * 32 * 4096 * 4096
    eager = of(attention="eager", activation_checkpointing="full")
    assert eager is not None
    assert eager.flops_per_token == pytest.approx(6 * weights + attention, rel=1e-3)
    assert eager == of(attention="eager", activation_checkpointing="none")
    assert eager.share(40_000) == pytest.approx(40_000 * eager.flops_per_token / 4e15)


def test_a_device_without_a_published_peak_has_none():
    assert of(flops=None) is None
