"""This machine's node, read through NVML's real C interface (a library built here stands in for the driver's)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vramplan.errors import SpecError
from vramplan.facts.devices import cpu_node, resolve_node
from vramplan.facts.host import Host
from vramplan.spec.run import HardwareSpec
from vramplan.units import GIB

HOST = Host(64 * GIB, 60 * GIB, 32 * GIB, GIB, GIB, 8)


@pytest.fixture(scope="module")
def driver_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler to build the stand-in for the driver's library")
    directory = tmp_path_factory.mktemp("driver")
    source = Path(__file__).with_name("nvml_double.c")
    library = directory / "libnvidia-ml.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    return directory


def node_with_driver(directory: Path, hardware: str = "", **variables: str) -> dict:
    code = f"""
import json
from vramplan.facts.devices import resolve_node
from vramplan.facts.nvml import read_driver
from vramplan.spec.run import HardwareSpec
from vramplan.errors import VramplanError
driver = read_driver()
try:
    node = resolve_node(HardwareSpec({hardware}))
except VramplanError as error:
    print(json.dumps({{"error": str(error)}}))
else:
    print(json.dumps({{
        "gpus": [gpu.name for gpu in driver.gpus] if driver else None, "name": node.device.name,
        "kind": node.device.kind, "count": node.gpus_per_node, "memory": node.device.memory_bytes,
        "usable": node.device.usable_bytes, "flops": node.device.bf16_flops, "capacity": node.capacity_bytes,
        "capability": node.device.compute_capability,
    }}))
"""
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    environment |= {"LD_LIBRARY_PATH": str(directory), **variables}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    return json.loads(done.stdout)


def test_all_gpus_are_used_and_the_smallest_decides(driver_directory: Path):
    node = node_with_driver(driver_directory)
    assert node["gpus"] == ["NVIDIA H100 80GB HBM3", "NVIDIA GeForce RTX 4090"]
    assert (node["count"], node["name"], node["kind"]) == (2, "NVIDIA GeForce RTX 4090", "cuda")
    assert node["usable"] == 24 * GIB - GIB // 2
    assert node["memory"] == 24 * GIB
    assert node["flops"] == pytest.approx(165.2e12)


def test_as_many_gpus_as_asked_for(driver_directory: Path):
    node = node_with_driver(driver_directory, "gpus_per_node=1, memory_cap='40GiB'")
    assert (node["count"], node["name"], node["capability"]) == (1, "NVIDIA H100 80GB HBM3", [9, 0])
    assert node["capacity"] == 40 * GIB


def test_more_gpus_than_there_are_is_an_error(driver_directory: Path):
    assert "is 3 but this machine shows 2" in node_with_driver(driver_directory, "gpus_per_node=3")["error"]


@pytest.mark.parametrize(
    ("visible", "names"),
    [("1", ["NVIDIA GeForce RTX 4090"]), ("GPU-second,0", ["NVIDIA GeForce RTX 4090", "NVIDIA H100 80GB HBM3"])],
)
def test_cuda_visible_devices_decides_which(driver_directory: Path, visible: str, names: list[str]):
    assert node_with_driver(driver_directory, CUDA_VISIBLE_DEVICES=visible)["gpus"] == names


@pytest.mark.parametrize("visible", ["", "-1", "7,0"])
def test_no_visible_gpu_means_the_cpu(driver_directory: Path, visible: str):
    node = node_with_driver(driver_directory, CUDA_VISIBLE_DEVICES=visible)
    assert (node["gpus"], node["kind"], node["count"]) == ([], "cpu", 2)


def test_a_library_without_a_driver_means_the_cpu(driver_directory: Path):
    assert node_with_driver(driver_directory, DOUBLE_NO_DRIVER="1")["kind"] == "cpu"


def test_an_old_driver_keeps_its_reserved_part_to_itself(driver_directory: Path):
    assert node_with_driver(driver_directory, "gpus_per_node=1", DOUBLE_OLD_DRIVER="1")["usable"] == 80 * GIB


def test_ranks_on_the_cpu_share_its_memory():
    node = cpu_node(HOST)
    assert node.gpus_per_node == 2
    assert node.capacity_bytes == 16 * GIB
    assert node.host_memory_bytes == 32 * GIB
    assert cpu_node(HOST, 4).capacity_bytes == 8 * GIB


def test_a_host_without_a_figure_asks_for_one():
    with pytest.raises(SpecError, match="memory_cap"):
        cpu_node(Host(None, None, None, None, None, 8))


def test_a_catalogue_gpu_is_one_unless_more_are_asked_for():
    assert resolve_node(HardwareSpec(gpu="h100")).world_size == 1
    node = resolve_node(HardwareSpec(gpu="h100", gpus_per_node=8, nodes=2, memory_cap="70GiB", host_memory="2TiB"))
    assert node.world_size == 16
    assert node.capacity_bytes == 70 * GIB
    assert node.host_memory_bytes == 2048 * GIB


def test_a_cap_above_the_device_changes_nothing():
    device = resolve_node(HardwareSpec(gpu="h100")).device
    assert resolve_node(HardwareSpec(gpu="h100", memory_cap="1TiB")).capacity_bytes == device.usable_bytes


@pytest.mark.parametrize(("field", "value"), [("memory_cap", "many"), ("host_memory", "3 apples"), ("memory_cap", 0)])
def test_a_size_that_is_none_names_its_field(field, value):
    with pytest.raises(SpecError, match=f"hardware.{field}"):
        resolve_node(HardwareSpec(gpu="h100", **{field: value}))
