"""The host's memory is what the process may use: the machine's, or its control group's if that is less."""

from __future__ import annotations

from pathlib import Path

import pytest

from vramplan.facts.host import cgroup_limit_bytes, oom_kill_counts, read_host
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


# as mm/memcontrol.c of Linux writes v2's memory.events, and v1's memory.oom_control
EVENTS_V2 = "low 0\nhigh 0\nmax 41\noom 3\noom_kill 2\noom_group_kill 0\n"
CONTROL_V1 = "oom_kill_disable 0\nunder_oom 0\noom_kill 1\n"


def test_kills_are_counted_in_a_v2_group_and_its_parents(machine: Path):
    write(machine, "proc/77/cgroup", "0::/slurm/job_5/step_0\n")
    write(machine, "sys/fs/cgroup/slurm/job_5/step_0/memory.events", EVENTS_V2)
    write(machine, "sys/fs/cgroup/slurm/job_5/memory.events", EVENTS_V2.replace("oom_kill 2", "oom_kill 7"))
    write(machine, "proc/vmstat", "nr_free_pages 9\noom_kill 12\n")
    counts = {path.parent.name: count for path, count in oom_kill_counts(machine, "77").items()}
    assert counts == {"step_0": 2, "job_5": 7, "proc": 12}


def test_kills_are_counted_in_a_v1_group(machine: Path):
    write(machine, "proc/self/cgroup", "9:name=systemd:/\n4:memory:/docker/x\n0::/\n")
    write(machine, "sys/fs/cgroup/memory/docker/x/memory.oom_control", CONTROL_V1)
    assert list(oom_kill_counts(machine).values()) == [1]


def test_an_older_kernel_and_a_process_that_is_gone_count_nothing(machine: Path):
    write(machine, "proc/self/cgroup", "4:memory:/docker/x\n")
    write(machine, "sys/fs/cgroup/memory/docker/x/memory.oom_control", "oom_kill_disable 0\nunder_oom 0\n")
    assert oom_kill_counts(machine) == oom_kill_counts(machine, "4711") == {}


def test_this_machine_answers():
    host = read_host()
    assert host.num_cpus >= 1
    assert host.memory_bytes is None or host.memory_bytes > GIB
