"""The doctor names what will hurt, and only that."""

from __future__ import annotations

import importlib.metadata
import re
from dataclasses import replace

import pytest

from vramplan.facts.environment import TESTED_VERSIONS, DeepSpeedOps, Environment, read_environment
from vramplan.facts.health import Finding, Level, findings
from vramplan.facts.host import Host
from vramplan.facts.nvml import LocalGpu, NvidiaDriver
from vramplan.units import GIB, MIB

H100 = LocalGpu(0, "NVIDIA H100 80GB HBM3", 80 * GIB, 79 * GIB, 79 * GIB - 10 * MIB, (9, 0))
HEALTHY = Environment(
    python_version="3.11.7",
    versions=TESTED_VERSIONS,
    torch_cuda="13.0",
    driver=NvidiaDriver("580.65.06", (H100,)),
    host=Host(512 * GIB, 500 * GIB, None, 64 * GIB, 64 * GIB, 64),
    ops=DeepSpeedOps((), "/usr/bin/c++", "/usr/bin/ninja", "/usr/local/cuda/bin/nvcc", "13.0"),
    variables={},
)


def hurting(environment: Environment) -> dict[str, Finding]:
    return {item.subject: item for item in findings(environment) if item.level is not Level.OK}


def test_nothing_hurts_on_a_healthy_machine():
    assert hurting(HEALTHY) == {}
    assert any("79.0 GiB of 80.0 GiB" in item.text for item in findings(HEALTHY))


def versions(**changed: str | None) -> dict[str, str | None]:
    return {**TESTED_VERSIONS, **changed}


def gpu(**changed: object) -> NvidiaDriver:
    return NvidiaDriver("580", (replace(H100, **changed),))


NO_NVCC = DeepSpeedOps((), "/usr/bin/c++", "/usr/bin/ninja", None, None)


@pytest.mark.parametrize(
    ("change", "subject", "level", "said"),
    [
        ({"versions": versions(torch=None)}, "packages", Level.BLOCKS, "not installed: torch"),
        ({"versions": versions(deepspeed="0.18.0")}, "packages", Level.HURTS, r"deepspeed 0\.18\.0 \(tested: 0\.19\.8"),
        ({"driver": None}, "GPUs", Level.HURTS, "no NVIDIA driver"),
        ({"driver": NvidiaDriver("580", ())}, "GPUs", Level.HURTS, "shows no GPU"),
        ({"driver": NvidiaDriver("580", (H100, replace(H100, index=1, name="x")))}, "GPUs", Level.HURTS, "differ"),
        ({"driver": gpu(free_bytes=60 * GIB)}, "GPU 0", Level.HURTS, "19.0 GiB of it is taken"),
        ({"driver": gpu(compute_capability=(7, 5))}, "GPU 0", Level.HURTS, "no bf16"),
        ({"torch_cuda": None}, "torch", Level.BLOCKS, "built without CUDA"),
        ({"host": replace(HEALTHY.host, shm_free_bytes=64 * MIB)}, "/dev/shm", Level.HURTS, "64.0 MiB free"),
        ({"host": replace(HEALTHY.host, memory_available_bytes=GIB)}, "host memory", Level.HURTS, "1.0 GiB available"),
        ({"ops": NO_NVCC}, "DeepSpeed ops", Level.BLOCKS, "no nvcc"),
        ({"ops": replace(HEALTHY.ops, nvcc_version="12.8")}, "DeepSpeed ops", Level.BLOCKS, "CUDA 12.8, torch of 13.0"),
        ({"ops": replace(HEALTHY.ops, ninja=None)}, "DeepSpeed ops", Level.BLOCKS, "ninja not on the path"),
        ({"variables": {"DS_ACCELERATOR": "cpu"}}, "DS_ACCELERATOR", Level.HURTS, "leave the GPUs idle"),
        ({"variables": {"NCCL_P2P_DISABLE": "1"}}, "NCCL_P2P_DISABLE", Level.HURTS, "slower"),
    ],
)
def test_each_ailment_is_named(change, subject, level, said):
    found = hurting(replace(HEALTHY, **change))
    assert set(found) == {subject}
    assert found[subject].level is level
    assert re.search(said, found[subject].text)


def test_what_is_prebuilt_needs_no_compiler():
    ops = DeepSpeedOps(("cpu_adam", "fused_adam"), None, None, None, None)
    assert hurting(replace(HEALTHY, ops=ops)) == {}


def test_a_cpu_only_machine_needs_no_cuda_toolkit():
    assert set(hurting(replace(HEALTHY, driver=None, torch_cuda=None, ops=NO_NVCC))) == {"GPUs"}


def test_a_group_s_limit_is_told_apart_from_the_machine():
    limited = replace(HEALTHY, host=replace(HEALTHY.host, memory_limit_bytes=32 * GIB))
    assert any(
        "32.0 GiB for this process (control group's limit; the machine has 512.0 GiB)" in f.text
        for f in findings(limited)
    )


def test_this_machine_is_read_without_importing_what_it_looks_at():
    environment = read_environment()
    for package in TESTED_VERSIONS:
        assert environment.versions[package] == importlib.metadata.version(package)
    assert findings(environment)
