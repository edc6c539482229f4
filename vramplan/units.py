"""Bytes and counts as text: the only place where bytes become text."""

from __future__ import annotations

import re

KIB = 2**10
MIB = 2**20
GIB = 2**30
TIB = 2**40

_SUFFIXES = {
    "": 1,
    "b": 1,
    "k": 10**3,
    "kb": 10**3,
    "kib": KIB,
    "m": 10**6,
    "mb": 10**6,
    "mib": MIB,
    "g": 10**9,
    "gb": 10**9,
    "gib": GIB,
    "t": 10**12,
    "tb": 10**12,
    "tib": TIB,
}
_SIZE = re.compile(r"^\s*([0-9]+(?:\.[0-9]+)?)\s*([a-z]*)\s*$", re.IGNORECASE)


def format_bytes(num_bytes: int) -> str:
    """Text of a number of bytes in binary units, e.g. ``84934656000`` -> ``"79.1 GiB"``."""
    sign, magnitude = ("-" if num_bytes < 0 else ""), abs(num_bytes)
    for unit, size in (("TiB", TIB), ("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        # 0.9995 so that 1023.95 MiB reads as 1.0 GiB and not as 1024.0 MiB
        if magnitude >= size * 0.9995:
            return f"{sign}{magnitude / size:.1f} {unit}"
    return f"{sign}{magnitude} B"


def parse_bytes(text: str) -> int:
    """Bytes meant by a text such as ``"24GiB"``, ``"1.5 GB"`` or ``"1000"``.

    Raises:
        ValueError: the text is not a number followed by a known unit.
    """
    match = _SIZE.match(text)
    if match is None or match.group(2).lower() not in _SUFFIXES:
        raise ValueError(f"{text!r} is not a size; write a number and a unit, such as 24GiB or 24GB")
    return int(float(match.group(1)) * _SUFFIXES[match.group(2).lower()])


def format_count(count: int) -> str:
    """Text of a large count in decimal units, e.g. ``8030261248`` -> ``"8.03 B"``."""
    for unit, size in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if abs(count) >= size:
            return f"{count / size:.2f} {unit}"
    return str(count)


def format_seconds(seconds: float) -> str:
    """Text of a duration, e.g. ``83.0`` -> ``"1 min 23 s"``."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"
