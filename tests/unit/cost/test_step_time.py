"""The order in which step times put plans."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from vramplan.cost.step_time import CostModel, StepTime, link_bandwidth, step_time_s
from vramplan.facts.device import Device, Node
from vramplan.facts.devices import find_device
from vramplan.facts.resolve import resolve_architecture
from vramplan.spec.load import merge, run_from_mapping
from vramplan.spec.run import RunSpec

BASE = {
    "model": "meta-llama/Llama-3.1-8B",
    "seq_len": 2048,
    "micro_batch_size": 4,
    "grad_accum_steps": 2,
    "activation_checkpointing": "none",
    "zero": {"stage": 2, "offload_optimizer": "none", "offload_param": "none"},
    "layout": {"dp": 8},
}
NODES = {
    "h100": Node(find_device("h100-80gb"), 8),
    "rtx4090": Node(find_device("rtx4090"), 8),
    "cpu": Node(Device("CPU", "cpu", 2**36, 2**33), 8),
}


def ask(**fields: object) -> RunSpec:
    return run_from_mapping(merge(BASE, fields))


def seconds(node: Node, **fields: object) -> float:
    run = ask(**fields)
    return step_time_s(run, node, resolve_architecture(run))


@pytest.mark.parametrize("node", NODES.values(), ids=NODES)
def test_checkpointing_costs_time(node: Node):
    assert seconds(node, activation_checkpointing="full") > seconds(node) * 1.1


@pytest.mark.parametrize("node", NODES.values(), ids=NODES)
def test_a_higher_stage_is_no_faster_than_stage_1(node: Node):
    stages = [seconds(node, zero={"stage": stage}) for stage in (1, 2, 3)]
    assert stages == sorted(stages)


@pytest.mark.parametrize("node", NODES.values(), ids=NODES)
def test_offload_comes_last(node: Node):
    kept = seconds(node, zero={"stage": 3})
    optimizer = seconds(node, zero={"stage": 3, "offload_optimizer": "cpu"})
    both = seconds(node, zero={"stage": 3, "offload_optimizer": "cpu", "offload_param": "cpu"})
    assert kept < optimizer < both


@pytest.mark.parametrize("node", NODES.values(), ids=NODES)
def test_a_larger_micro_batch_is_faster_but_ever_less_so(node: Node):
    times = [seconds(node, micro_batch_size=16 // accum, grad_accum_steps=accum) for accum in (16, 8, 4, 2, 1)]
    assert times == sorted(times, reverse=True)
    gains = [slow - fast for slow, fast in pairwise(times)]
    assert gains == sorted(gains, reverse=True)


def test_an_8b_model_trains_at_a_believable_share_of_an_h100():
    run = ask(seq_len=4096)
    node = NODES["h100"]
    architecture = resolve_architecture(run)
    tokens = 4 * 2 * 4096
    utilisation = 6 * architecture.num_params * tokens / step_time_s(run, node, architecture) / 989e12
    assert 0.3 < utilisation < 0.6


def test_the_parts_add_up():
    run = ask(zero={"stage": 3, "offload_optimizer": "cpu"})
    parts = CostModel(run, NODES["h100"], resolve_architecture(run)).step_time(run)
    assert isinstance(parts, StepTime)
    assert all(part > 0 for part in (parts.compute_s, parts.communication_s, parts.offload_s, parts.optimizer_s))
    assert parts.total_s == parts.compute_s + parts.communication_s + parts.offload_s + parts.optimizer_s


def test_the_network_bounds_a_ring_over_nodes():
    one = NODES["h100"]
    assert link_bandwidth(replace(one, num_nodes=2)) < link_bandwidth(one)
    assert link_bandwidth(one) > link_bandwidth(NODES["rtx4090"]) > link_bandwidth(NODES["cpu"])


def test_a_gpu_that_the_catalogue_does_not_know_still_ranks():
    unknown = Node(Device("Mystery", "cuda", 2**35, 2**35), 8)
    assert seconds(unknown, activation_checkpointing="full") > seconds(unknown) > 0


def test_qlora_pays_for_dequantization():
    lora, qlora = (seconds(NODES["h100"], method={"kind": kind, "r": 8}) for kind in ("lora", "qlora"))
    assert qlora > lora
