"""The host's memory is what the process may use: the machine's, or its control group's if that is less."""

from __future__ import annotations

from pathlib import Path

import pytest

from vramplan.facts.host import cgroup_limit_bytes, read_host
from vramplan.units import GIB


def write(root: Path, path: str, text: str) -> None:
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    write(tmp_path, "proc/meminfo", f"MemTotal: {64 * 2**20} kB\nMemAvailable: {50 * 2**20} kB\nHugePages_Total: 0\n")
    write(tmp_path, "proc/self/cgroup", "0::/\n")
    return tmp_path


def test_without_a_limit_it_is_the_machine_s(machine: Path):
    host = read_host(machine)
    assert host.memory_bytes == host.memory_total_bytes == 64 * GIB
    assert host.memory_available_bytes == 50 * GIB
    assert host.memory_limit_bytes is None
    assert host.shm_total_bytes is None


def test_a_v2_limit_of_a_parent_counts(machine: Path):
    write(machine, "proc/self/cgroup", "0::/kubepods/pod1/container\n")
    write(machine, "sys/fs/cgroup/kubepods/pod1/container/memory.max", "max\n")
    write(machine, "sys/fs/cgroup/kubepods/pod1/memory.max", f"{16 * GIB}\n")
    assert read_host(machine).memory_bytes == 16 * GIB


def test_a_v1_limit_counts_and_its_no_limit_does_not(machine: Path):
    write(machine, "proc/self/cgroup", "5:cpu:/a\n4:memory:/docker/x\n")
    write(machine, "sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n")
    assert cgroup_limit_bytes(machine) is None
    write(machine, "sys/fs/cgroup/memory/docker/x/memory.limit_in_bytes", f"{8 * GIB}\n")
    assert cgroup_limit_bytes(machine) == 8 * GIB


def test_a_container_s_own_mount_counts(machine: Path):
    """In a container the group's path is the host's, while its own limit lies at the mount's top."""
    write(machine, "proc/self/cgroup", "4:memory:/docker/unseen\n")
    write(machine, "sys/fs/cgroup/memory/memory.limit_in_bytes", f"{4 * GIB}\n")
    assert cgroup_limit_bytes(machine) == 4 * GIB


def test_this_machine_answers():
    host = read_host()
    assert host.num_cpus >= 1
    assert host.memory_bytes is None or host.memory_bytes > GIB
