"""Seeds: one stream for the weights that a run makes, one for each (step, micro-batch, rank)."""

from __future__ import annotations

import hashlib

import torch


def seed_initial_weights(seed: int) -> None:
    """The same on every rank: adapters must start equal."""
    torch.manual_seed(_mix(seed, "weights"))


def seed_micro_batch(seed: int, step: int, micro: int, rank: int) -> None:
    """Dropout of a micro-batch depends on nothing else, so a resumed run draws what the uninterrupted one drew."""
    torch.manual_seed(_mix(seed, step, micro, rank))


def _mix(*parts: object) -> int:
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1  # torch takes 63 bits without reading them as negative
