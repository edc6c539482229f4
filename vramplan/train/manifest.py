"""Whether every file of a checkpoint is whole: names, sizes and CRC-32, checked by all ranks together."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import torch.distributed as dist

from vramplan.measure.run_dir import write_json
from vramplan.train.progress import tell

MANIFEST = "manifest.json"
_CHUNK_BYTES = 16 * 2**20


def write_manifest(directory: Path) -> None:
    """Describes every file below ``directory`` in its manifest. Each rank reads a share; rank 0 writes."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    mine = {name: _describe(directory / name) for name in _files(directory)[rank::world_size]}
    shares: list[Any] = [None] * world_size
    dist.all_gather_object(shares, mine)
    if rank == 0:
        write_json(directory / MANIFEST, {name: entry for share in shares for name, entry in sorted(share.items())})
    dist.barrier()


def find_damage(directory: Path) -> str | None:
    """What is wrong with a checkpoint, the same answer on every rank; None when all is whole. Collective."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    found: list[Any] = [None] * world_size
    dist.all_gather_object(found, _find_damage_of_share(directory, rank, world_size))
    return next((damage for damage in found if damage is not None), None)


def find_missing_bytes(directory: Path) -> str | None:
    """As ``find_damage``, by names and sizes alone: one rank may ask, and no file is read."""
    try:
        expected = _read_manifest(directory)
    except (OSError, ValueError):
        return f"{MANIFEST} cannot be read"
    found = (_missing_bytes(directory / name, name, size) for name, (size, _) in sorted(expected.items()))
    return next((damage for damage in found if damage is not None), None)


def _find_damage_of_share(directory: Path, rank: int, world_size: int) -> str | None:
    try:
        expected = _read_manifest(directory)
    except (OSError, ValueError):
        return f"{MANIFEST} cannot be read"
    for name in sorted(expected)[rank::world_size]:
        path, (size, checksum) = directory / name, expected[name]
        missing = _missing_bytes(path, name, size)
        if missing is not None:
            return missing
        if _checksum(path) != checksum:
            return f"{name} does not have the content that was written"
    return None


def _read_manifest(directory: Path) -> dict[str, tuple[int, int]]:
    content = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    return {name: (size, checksum) for name, (size, checksum) in content.items()}


def _missing_bytes(path: Path, name: str, size: int) -> str | None:
    if not path.is_file():
        return f"{name} is missing"
    if path.stat().st_size != size:
        return f"{name} has {path.stat().st_size} of {size} bytes"
    return None


def _files(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


def _describe(path: Path) -> tuple[int, int]:
    return path.stat().st_size, _checksum(path)


def _checksum(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            checksum = zlib.crc32(chunk, checksum)
            tell()
    return checksum
