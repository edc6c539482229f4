"""GPUs are found by the names that people and drivers use, and by no wrong one."""

from __future__ import annotations

import pytest

from vramplan.errors import AmbiguousNameError, UnknownNameError
from vramplan.facts.devices import all_devices, find_device, list_devices


@pytest.mark.parametrize("device", all_devices(), ids=lambda device: device.name)
class TestEveryDevice:
    def test_finds_itself_by_name(self, device):
        assert find_device(device.name) is device

    def test_offers_no_more_than_it_has(self, device):
        assert 0.9 * device.memory_bytes < device.usable_bytes <= device.memory_bytes

    def test_says_where_its_figures_come_from(self, device):
        assert device.source.startswith("memory: ")
        assert len(device.source.split("; ")) >= 2


@pytest.mark.parametrize(
    ("query", "name"),
    [
        ("h100-80gb", "NVIDIA H100 80GB HBM3 (SXM)"),
        ("H100", "NVIDIA H100 80GB HBM3 (SXM)"),
        ("h100-sxm5", "NVIDIA H100 80GB HBM3 (SXM)"),
        ("NVIDIA H100 80GB HBM3", "NVIDIA H100 80GB HBM3 (SXM)"),
        ("h100 pcie", "NVIDIA H100 PCIe"),
        ("h100_nvl", "NVIDIA H100 NVL"),
        ("a100-40gb", "NVIDIA A100-SXM4-40GB"),
        ("A100-80G", "NVIDIA A100-SXM4-80GB"),
        ("rtx4090", "GeForce RTX 4090"),
        ("4090", "GeForce RTX 4090"),
        ("4060ti", "GeForce RTX 4060 Ti 16GB"),
        ("rtx 6000 ada", "NVIDIA RTX 6000 Ada Generation"),
        ("A10", "NVIDIA A10"),
        ("a10g", "NVIDIA A10G"),
        ("l40", "NVIDIA L40"),
        ("v100-32gb", "Tesla V100-SXM2-32GB"),
        ("mi300x", "AMD Instinct MI300X"),
        ("NVIDIA H200", "NVIDIA H200 (SXM)"),
        ("NVIDIA GH200 480GB", "NVIDIA GH200 480GB (96GB HBM3)"),
    ],
)
def test_a_loose_name_finds_its_device(query, name):
    assert find_device(query).name == name


@pytest.mark.parametrize(
    ("query", "candidates"),
    [
        ("A100", {"NVIDIA A100-SXM4-40GB", "NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB PCIe"}),
        ("v100", {"Tesla V100-SXM2-16GB", "Tesla V100-SXM2-32GB"}),
    ],
)
def test_a_name_of_cards_with_different_memory_is_ambiguous(query, candidates):
    with pytest.raises(AmbiguousNameError, match=f"{query}-[0-9]+gb") as raised:
        find_device(query)
    assert set(raised.value.candidates) == candidates


@pytest.mark.parametrize(
    "query",
    [
        "rtx 4060",  # the 8 GB card is not the Ti with 16 GB
        "rtx 2080",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA A100-PCIE-40GB",
        "h100-94gb-sxm",
        "nvidia",
        "80gb",
        "",
    ],
)
def test_another_card_is_not_taken_for_a_known_one(query):
    with pytest.raises(UnknownNameError):
        find_device(query)


@pytest.mark.parametrize(
    ("query", "near"), [("h1oo", "H100"), ("rtx 4060", "RTX 4060 Ti"), ("rtx6000", "RTX PRO 6000")]
)
def test_an_unknown_card_names_the_nearest(query, near):
    with pytest.raises(UnknownNameError, match=near):
        find_device(query)


def test_listing_shows_every_form_of_a_card():
    assert [device.name for device in list_devices("h100")] == [
        "NVIDIA H100 PCIe",
        "NVIDIA H100 80GB HBM3 (SXM)",
        "NVIDIA H100 NVL",
    ]
    assert list_devices("rtx 40") == tuple(device for device in all_devices() if "RTX 40" in device.name)
