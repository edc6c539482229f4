"""Offload to files: what stays in memory, what lies on the disk, and what is refused."""

from __future__ import annotations

import pytest

from vramplan.facts.device import Node
from vramplan.facts.devices import find_device
from vramplan.facts.resolve import resolve_architecture
from vramplan.memory.estimate import UncoveredError, estimate
from vramplan.memory.ledger import Estimate
from vramplan.spec.run import RunSpec

SHARE = 134_515_008 // 8
"""Elements of a rank of SmolLM2-135M; every tensor divides by 8."""
FILE = -(-4 * SHARE // 1024) * 1024
"""Bytes of a state's file: whole blocks."""
LARGEST = 49152 * 576 // 8


def ask(zero, **fields) -> Estimate:
    stage = {"stage": 3, "nvme_path": "/disk", **zero}
    chosen = {"micro_batch_size": 1, "grad_accum_steps": 1, "activation_checkpointing": "full", "seq_len": 256}
    run = RunSpec(model="HuggingFaceTB/SmolLM2-135M-Instruct", zero=stage, **{**chosen, **fields})
    return estimate(run, Node(find_device("h100-80gb"), 8), resolve_architecture(run))


def host(found: Estimate) -> dict[str, int]:
    return {term.name: term.num_bytes for term in found.host_terms}


def test_states_lie_in_files_and_come_through_four_buffers():
    found = ask({"offload_optimizer": "nvme", "offload_param": "none"})
    assert host(found)["host: buffers between memory and files"] == 4 * FILE
    assert not [name for name in host(found) if name.startswith("host: fp32 master weights")]
    disk = {term.name: term.num_bytes for term in found.disk_terms}
    assert disk["disk: fp32 master weights"] == FILE
    assert disk["disk: optimizer states"] == 2 * FILE
    assert 0 < disk["disk: gradients"] < 4 * SHARE  # parts below 1 MiB stay in memory
    assert found.disk_bytes_per_node == 8 * sum(disk.values())


def test_smaller_sub_groups_need_smaller_buffers():
    small = ask({"offload_optimizer": "nvme", "offload_param": "none", "sub_group_size": 4_000_000})
    assert host(small)["host: buffers between memory and files"] < 16 * SHARE
    assert sum(host(small).values()) < sum(host(ask({"offload_optimizer": "cpu", "offload_param": "none"})).values())


def test_gradients_are_on_the_device_in_fp32_before_they_are_written():
    found = ask({"offload_optimizer": "nvme", "offload_param": "none"})
    names = {each.phase: number for number, each in enumerate(found.phases)}
    terms = {each.name: each.num_bytes for each in found.moments[names["step2.micro1.optimizer_step"]].terms}
    assert 4 * (SHARE - LARGEST) <= terms["gradients on their way to files"] <= 4 * SHARE


def test_weights_in_files_have_a_pool_of_five_buffers():
    found = ask({"offload_optimizer": "nvme", "offload_param": "nvme"})
    assert host(found)["host: buffers of weights in files"] == 5 * 200_000_512  # each in whole blocks
    assert host(found)["host: weights"] == 2 * SHARE  # fewer than offload_param.max_in_cpu stay in memory too
    assert any(term.name == "disk: weights" for term in found.disk_terms)


@pytest.mark.parametrize(
    ("zero", "fields", "named"),
    [
        (
            {"offload_optimizer": "nvme", "offload_param": "nvme"},
            {"method": {"kind": "lora"}},
            "frozen weights on NVMe",
        ),
        ({"offload_optimizer": "none", "offload_param": "nvme"}, {}, "states in memory beside weights on NVMe"),
    ],
)
def test_what_is_not_counted_is_refused_by_name(zero, fields, named):
    with pytest.raises(UncoveredError, match=named):
        ask(zero, **fields)
