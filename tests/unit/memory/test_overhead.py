"""What the driver and the allocator hold beyond tensors: generations, groups, bands, and a file that replaces it."""

import json
from dataclasses import replace

import pytest

from vramplan.errors import SpecError
from vramplan.facts.device import Node
from vramplan.facts.devices import find_device, resolve_node
from vramplan.facts.overhead import SHIPPED, overheads
from vramplan.memory.overhead import overhead
from vramplan.spec.layout import Layout
from vramplan.spec.run import HardwareSpec
from vramplan.units import GIB, MIB

ALONE = Layout()


def terms(gpu, layout=ALONE, alloc_conf="", allocated=10 * GIB):
    found = overhead(Node(find_device(gpu), layout.world_size), layout, alloc_conf, allocated)
    return {term.name: term for term in found.terms}


def test_the_workspace_is_that_of_the_generation():
    assert terms("a100-80gb")["cuBLAS workspace"].num_bytes == 2 * 8_519_680
    assert terms("h100-80gb")["cuBLAS workspace"].num_bytes == 2 * 32 * MIB


def test_a_generation_that_nobody_measured_is_assumed():
    assert terms("a100-80gb")["device context"].basis.value == "fitted"
    assert terms("h100-80gb")["device context"].basis.value == "assumed"


def test_communicators_come_with_ranks_and_groups():
    alone, world, sequence = (terms("h100-80gb", Layout(dp=dp, sp=sp)) for dp, sp in ((1, 1), (8, 1), (4, 2)))
    assert "communicators" not in alone
    assert sequence["communicators"].num_bytes == 2 * world["communicators"].num_bytes
    shares, shares_alone = (terms("h100-80gb", Layout(dp=dp, tp=8 // dp)) for dp in (4, 1))
    assert shares["communicators"].num_bytes == 3 * world["communicators"].num_bytes
    assert shares_alone["communicators"].num_bytes == 2 * world["communicators"].num_bytes


def test_segments_that_grow_fragment_less():
    fixed, growing = terms("h100-80gb"), terms("h100-80gb", alloc_conf="expandable_segments: True")
    assert growing["allocator fragmentation"].num_bytes < fixed["allocator fragmentation"].num_bytes


def test_bands_hold_the_estimate_and_end_at_the_device():
    node = Node(find_device("a100-80gb"), 1)
    found = overhead(node, Layout(), "", 70 * GIB)
    beyond = sum(term.num_bytes for term in found.terms)
    assert found.reserved_band.holds(70 * GIB + 2 * 8_519_680)
    assert found.used_band.holds(70 * GIB + beyond)
    assert found.used_band.high_bytes == node.device.memory_bytes


def test_a_calibrated_file_takes_the_place_of_the_shipped_one(tmp_path):
    figures = json.loads(SHIPPED.read_text(encoding="utf-8"))
    figures["communicator"] |= {"mib": 700, "basis": "fitted"}
    own = tmp_path / "own.json"
    own.write_text(json.dumps(figures), encoding="utf-8")
    node = resolve_node(HardwareSpec(gpu="h100-80gb", gpus_per_node=8, overhead=str(own)))
    found = overhead(node, Layout(dp=8), "", GIB)
    assert {term.name: term.num_bytes for term in found.terms}["communicators"] == 700 * MIB
    assert overhead(replace(node, overhead_file=None), Layout(dp=8), "", GIB).terms != found.terms


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda raw: raw.pop("communicator"), "'communicator' is missing"),
        (lambda raw: raw["communicator"].update(basis="guessed"), "basis is 'guessed'"),
        (lambda raw: raw["communicator"].update(low_mib=9999), "between its low and its high"),
        (lambda raw: raw.update(device_context=[]), "empty"),
    ],
)
def test_a_file_with_a_mistake_is_answered_with_it(tmp_path, change, says):
    figures = json.loads(SHIPPED.read_text(encoding="utf-8"))
    change(figures)
    own = tmp_path / "own.json"
    own.write_text(json.dumps(figures), encoding="utf-8")
    with pytest.raises(SpecError, match=says):
        overheads(str(own))


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(SpecError, match="cannot be read"):
        overheads(str(tmp_path / "none.json"))
