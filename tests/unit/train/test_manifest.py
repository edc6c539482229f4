"""Damage of every kind is found, and the same answer is given on every rank."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from vramplan.train.manifest import MANIFEST, find_damage, find_missing_bytes, write_manifest


@pytest.fixture(autouse=True)
def one_rank():
    started = not dist.is_initialized()
    if started:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    if started:
        dist.destroy_process_group()


@pytest.fixture
def checkpoint(tmp_path):
    (tmp_path / "deepspeed").mkdir()
    (tmp_path / "deepspeed" / "shard.pt").write_bytes(bytes(range(256)) * 100)
    (tmp_path / "state.json").write_text("{}")
    write_manifest(tmp_path)
    return tmp_path


def test_what_was_written_is_whole(checkpoint):
    assert find_damage(checkpoint) is None
    assert find_missing_bytes(checkpoint) is None


def test_a_cut_file(checkpoint):
    shard = checkpoint / "deepspeed" / "shard.pt"
    shard.write_bytes(shard.read_bytes()[:1000])
    assert find_damage(checkpoint) == find_missing_bytes(checkpoint) == "deepspeed/shard.pt has 1000 of 25600 bytes"


def test_a_flipped_bit(checkpoint):
    shard = checkpoint / "deepspeed" / "shard.pt"
    content = bytearray(shard.read_bytes())
    content[12345] ^= 1
    shard.write_bytes(content)
    assert find_damage(checkpoint) == "deepspeed/shard.pt does not have the content that was written"


def test_a_missing_file(checkpoint):
    (checkpoint / "deepspeed" / "shard.pt").unlink()
    assert find_damage(checkpoint) == find_missing_bytes(checkpoint) == "deepspeed/shard.pt is missing"


def test_no_manifest_or_half_of_one(checkpoint):
    text = (checkpoint / MANIFEST).read_text()
    (checkpoint / MANIFEST).write_text(text[: len(text) // 2])
    assert find_damage(checkpoint) == find_missing_bytes(checkpoint) == "manifest.json cannot be read"
    (checkpoint / MANIFEST).unlink()
    assert find_damage(checkpoint) == find_missing_bytes(checkpoint) == "manifest.json cannot be read"
