"""Sizes in bytes as polynomials of the batch, so that one symbolic run answers every batch and sequence length.

A :class:`Size` is a tuple of integer coefficients over :data:`BASIS`. With ``T`` tokens of one micro-batch on one
rank (``batch * seq``) and ``s`` tokens of one sequence, a size is
``c[0] + c[1] T + c[2] s + c[3] T s + c[4] s s``: constants (weights), what grows with tokens (activations), what is
shared by the batch (rotary tables), score matrices, and masks shared by the batch.
"""

from __future__ import annotations

from collections.abc import Iterable

BASIS = ("1", "T", "s", "T*s", "s*s")
Size = tuple[int, int, int, int, int]
ZERO: Size = (0, 0, 0, 0, 0)


def const(num_bytes: int) -> Size:
    """A size that no batch changes."""
    return (num_bytes, 0, 0, 0, 0)


def per_token(num_bytes: int) -> Size:
    """Bytes for each token of the micro-batch."""
    return (0, num_bytes, 0, 0, 0)


def per_position(num_bytes: int) -> Size:
    """Bytes for each position of a sequence, shared by the batch."""
    return (0, 0, num_bytes, 0, 0)


def per_score(num_bytes: int) -> Size:
    """Bytes for each (query token, key position) pair: ``T * s`` of them."""
    return (0, 0, 0, num_bytes, 0)


def per_mask(num_bytes: int) -> Size:
    """Bytes for each pair of positions, shared by the batch."""
    return (0, 0, 0, 0, num_bytes)


def add(a: Size, b: Size) -> Size:
    """Both together."""
    return (a[0] + b[0], a[1] + b[1], a[2] + b[2], a[3] + b[3], a[4] + b[4])


def sub(a: Size, b: Size) -> Size:
    """The first without the second."""
    return (a[0] - b[0], a[1] - b[1], a[2] - b[2], a[3] - b[3], a[4] - b[4])


def scale(a: Size, factor: int) -> Size:
    """A size so many times."""
    return (a[0] * factor, a[1] * factor, a[2] * factor, a[3] * factor, a[4] * factor)


def evaluate(size: Size, basis: Size) -> int:
    """Bytes of ``size`` at the values ``basis`` of :data:`BASIS` (ints, or numpy arrays of one shape)."""
    return size[0] * basis[0] + size[1] * basis[1] + size[2] * basis[2] + size[3] * basis[3] + size[4] * basis[4]


def basis_at(batch: int, seq: int) -> Size:
    """The values of :data:`BASIS` for ``batch`` sequences of ``seq`` tokens on one rank."""
    tokens = batch * seq
    return (1, tokens, seq, tokens * seq, seq * seq)


def of_one_sequence(size: Size) -> Size:
    """A size where the micro-batch is one sequence, whatever the batch: ``T`` is ``s``."""
    return (size[0], 0, size[1] + size[2], 0, size[3] + size[4])


def dominates(a: Size, b: Size) -> bool:
    """Whether ``a`` is at least ``b`` for every batch (every basis value is non-negative)."""
    return a[0] >= b[0] and a[1] >= b[1] and a[2] >= b[2] and a[3] >= b[3] and a[4] >= b[4]


def undominated(sizes: Iterable[Size]) -> tuple[Size, ...]:
    """Those that can be the largest for some batch."""
    kept: list[Size] = []
    for size in sorted(sizes, key=lambda each: -sum(each)):
        if not any(dominates(other, size) for other in kept):
            kept.append(size)
    return tuple(kept)
