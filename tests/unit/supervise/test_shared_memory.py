"""Buffers that DeepSpeed leaves in shared memory are removed; those in use and those of others stay."""

import mmap
import os
import time
from pathlib import Path

from vramplan.supervise.shared_memory import remove_buffers, remove_forgotten_buffers


def buffer(directory: Path, port: int, rank: int, age_s: float = 0.0) -> Path:
    path = directory / f"deepspeed_allreduce_buffer_{os.getuid()}_127.0.0.1_{port}_{rank}"
    path.write_bytes(bytes(4096))
    os.utime(path, (time.time() - age_s, time.time() - age_s))
    return path


def test_the_buffers_of_an_ended_run_are_removed(tmp_path):
    own = [buffer(tmp_path, 29500, rank) for rank in (0, 1)]
    other = buffer(tmp_path, 29501, 0)
    remove_buffers(29500, tmp_path)
    assert not any(path.exists() for path in own)
    assert other.exists()


def test_forgotten_buffers_are_removed_but_not_those_in_use_or_just_made(tmp_path):
    forgotten = buffer(tmp_path, 1, 0, age_s=1000)
    young = buffer(tmp_path, 2, 0)
    used = buffer(tmp_path, 3, 0, age_s=1000)
    foreign = tmp_path / "another_program"
    foreign.write_bytes(b"x")
    os.utime(foreign, (0, 0))
    with used.open("r+b") as file, mmap.mmap(file.fileno(), 0):
        assert remove_forgotten_buffers(tmp_path) == 4096
    assert not forgotten.exists()
    assert all(path.exists() for path in (young, used, foreign))
