from __future__ import annotations

import os
import shlex
import subprocess
import sys

import pytest

from vramplan.emit.launch import (
    launch_command,
    launch_environment,
    local_launcher,
    process_identity,
    shell_text,
    torchrun_command,
)
from vramplan.facts.device import Device, Node
from vramplan.spec.run import RunSpec

RUN = RunSpec(model="x", alloc_conf="expandable_segments:True")


def node(kind="cuda", gpus=8, nodes=1):
    return Node(Device("d", kind, 1, 1), gpus, nodes)


def test_deepspeeds_own_parser_reads_the_command():
    from deepspeed.launcher.runner import parse_args

    command = launch_command(node(gpus=2), "plan.yaml", "run", resume=True, port=1234, log_dir="logs")
    assert command[0] == "deepspeed"
    parsed = parse_args(command[1:])
    assert (parsed.num_gpus, parsed.master_port, parsed.module, parsed.no_local_rank) == (2, 1234, True, True)
    assert parsed.enable_each_rank_log == "logs"
    assert (parsed.user_script, parsed.user_args) == ("vramplan.train", ["plan.yaml", "run", "--resume"])


def test_several_nodes_are_reached_through_a_hostfile():
    from deepspeed.launcher.runner import parse_args

    parsed = parse_args(launch_command(node(nodes=2), "p", "r", hostfile="hosts")[1:])
    assert (parsed.num_nodes, parsed.hostfile) == (2, "hosts")


def test_torchruns_own_parser_reads_its_command():
    from torch.distributed.run import parse_args

    parsed = parse_args(torchrun_command(node(gpus=2), "p", "r", resume=True)[1:])
    assert (parsed.nproc_per_node, parsed.standalone, parsed.module) == ("2", True, True)
    assert parsed.training_script_args == ["p", "r", "--resume"]
    assert parse_args(torchrun_command(node(nodes=2), "p", "r")[1:]).nnodes == "2"


def test_the_local_launcher_is_of_this_python():
    assert local_launcher()[0] == sys.executable


def test_cpu_ranks_share_the_cores():
    environment = launch_environment(RUN, node("cpu", gpus=2), inherited={})
    assert environment["DS_ACCELERATOR"] == "cpu"
    assert environment["OMP_NUM_THREADS"] == str(max(1, os.cpu_count() // 2))


def test_what_the_user_set_stays():
    assert launch_environment(RUN, node(), inherited={"DS_ACCELERATOR": "x", "PYTHONSAFEPATH": ""}) == {
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"
    }
    assert launch_environment(RUN, node("rocm"), inherited={})["DS_ACCELERATOR"] == "cuda"


@pytest.mark.parametrize(
    ("inherited", "seen"),
    [
        ({}, "expandable_segments:True"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:False"}, "expandable_segments:True"),
        (
            {"PYTORCH_CUDA_ALLOC_CONF": "roundup_power2_divisions:[256:1,>:8],max_split_size_mb:128"},
            "roundup_power2_divisions:[256:1,>:8],max_split_size_mb:128,expandable_segments:True",
        ),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, "max_split_size_mb:64,expandable_segments:True"),
    ],
)
def test_the_allocators_settings_of_the_plan_reach_the_ranks_whatever_the_user_exports(inherited, seen):
    found = launch_environment(RUN, node(), inherited=inherited)
    assert found["PYTORCH_CUDA_ALLOC_CONF"] == seen
    again = launch_environment(RUN, node(), inherited={**inherited, **found})  # a rank, started by the launcher
    assert again["PYTORCH_CUDA_ALLOC_CONF"] == seen


def test_settings_that_the_plan_does_not_have_stay_as_they_are():
    bare = RunSpec(model="x")
    assert "PYTORCH_CUDA_ALLOC_CONF" not in launch_environment(bare, node(), inherited={"PYTORCH_CUDA_ALLOC_CONF": "x"})


def test_the_shell_reads_the_text_as_it_was_meant():
    text = shell_text(["echo", "a b", "$HOME"], {"X": "1 2"})
    assert shlex.split(text) == ["X=1 2", "echo", "a b", "$HOME"]
    assert subprocess.run(text, shell=True, capture_output=True, text=True).stdout == f"a b {os.environ['HOME']}\n"


def test_a_process_is_known_by_its_start():
    identity = process_identity(os.getpid())
    assert identity is not None
    assert identity.startswith(f"{os.getpid()}:")
    assert process_identity(os.getpid()) == identity
    with subprocess.Popen(["true"]) as gone:
        gone.wait()
    assert process_identity(gone.pid) is None
