"""Bytes on the wire by ZeRO stage, against the counts of the ZeRO paper and of DeepSpeed's source."""

from __future__ import annotations

import pytest

from vramplan.cost.traffic import Traffic, step_traffic
from vramplan.facts.resolve import resolve_architecture
from vramplan.spec.load import merge, run_from_mapping

PARAMS = 8_030_261_248
BASE = {
    "model": "meta-llama/Llama-3.1-8B",
    "micro_batch_size": 1,
    "grad_accum_steps": 1,
    "zero": {"stage": 0, "offload_optimizer": "none", "offload_param": "none"},
    "layout": {"dp": 8},
}


def traffic(**fields: object) -> Traffic:
    run = run_from_mapping(merge(BASE, fields))
    return step_traffic(run, resolve_architecture(run))


@pytest.mark.parametrize(("stage", "weights_moved"), [(0, 2), (1, 3), (2, 3), (3, 3)])
def test_bytes_of_one_step_in_multiples_of_the_weights(stage: int, weights_moved: int):
    # ZeRO paper (arXiv 1910.02054) section 7: 2 Psi for stages 0 to 2, 3 Psi for stage 3; DeepSpeed's stages 1 and 2
    # all-reduce (2 Psi) where the paper reduce-scatters (1 Psi), and gather updated weights (1 Psi)
    expected = weights_moved * 2 * PARAMS * 7 / 8
    assert traffic(zero={"stage": stage}).link_bytes == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("stage", "growth"), [(0, 1.0), (1, 1.0), (2, 3.0), (3, 4.0)])
def test_accumulation_costs_only_where_every_micro_batch_reduces(stage: int, growth: float):
    one = traffic(zero={"stage": stage}).backward_bytes
    four = traffic(zero={"stage": stage}, grad_accum_steps=4).backward_bytes
    assert four / one == pytest.approx(4.0 if stage >= 2 else growth)


def test_one_rank_sends_nothing():
    alone = traffic(zero={"stage": 2}, layout={"dp": 1})
    assert alone.link_bytes == 0
    assert alone.num_collectives == 0


def test_adapters_reduce_only_their_own_gradients():
    adapters = traffic(method={"kind": "lora", "r": 16}, zero={"stage": 2})
    assert adapters.link_bytes == pytest.approx(3 * 2 * 41_943_040 * 7 / 8, rel=1e-6)
    gathered = traffic(method={"kind": "lora", "r": 16}, zero={"stage": 3})
    assert gathered.link_bytes > 2 * 2 * PARAMS * 7 / 8


def test_offload_moves_this_ranks_part_over_pcie():
    kept = traffic(zero={"stage": 3})
    optimizer = traffic(zero={"stage": 3, "offload_optimizer": "cpu"})
    both = traffic(zero={"stage": 3, "offload_optimizer": "cpu", "offload_param": "cpu"})
    assert kept.host_bytes == 0
    assert optimizer.host_bytes == pytest.approx(PARAMS / 8 * (2 + 2), rel=1e-6)
    assert both.host_bytes - optimizer.host_bytes == pytest.approx(PARAMS / 8 * 2 * 2, rel=1e-6)
    accumulated = traffic(zero={"stage": 2, "offload_optimizer": "cpu"}, grad_accum_steps=3)
    assert accumulated.host_bytes == pytest.approx(PARAMS / 8 * (5 * 2 + 2), rel=1e-6)


def test_only_stage_3_runs_hooks():
    assert traffic(zero={"stage": 2}).num_hooks == 0
    # 32 layers of 7 linears and 2 norms, embedding, final norm, head; forward and backward
    assert traffic(zero={"stage": 3}).num_hooks == 2 * (32 * 9 + 3)
