"""Whether an estimate has room in what a device and its host offer, and if not, what is too much."""

from __future__ import annotations

from vramplan.memory.ledger import Estimate
from vramplan.units import format_bytes

MARGIN_FRAC = 0.02
"""Share of the capacity that a plan leaves free, for what the arithmetic does not see.
ASSUMED: twice the estimator's own aim of 1 %."""


def limit_bytes(capacity_bytes: int, margin_frac: float) -> int:
    """Bytes that a run may use of a device's capacity where ``margin_frac`` of it stays free."""
    return int(capacity_bytes * (1 - margin_frac))


def fits_with_margin(found: Estimate, margin_frac: float) -> bool:
    """Whether an estimate leaves ``margin_frac`` of the device's capacity free, and the host's bytes fit."""
    return found.host_fits and found.used_peak_bytes <= limit_bytes(found.capacity_bytes, margin_frac)


def shortfall(found: Estimate) -> tuple[bool, bool, int, int]:
    """Orders estimates by how far they are from fitting: a host that is too small is worst; of these, what is too much
    for the device as well, then what lacks most of the host."""
    if found.host_fits:
        return False, False, 0, found.used_peak_bytes
    return True, found.used_peak_bytes > found.capacity_bytes, found.host_bytes_per_node, found.used_peak_bytes


def not_tried(reasons: tuple[str, ...]) -> str:
    """What is said behind a refusal of ways that the search has and left out; empty where it left out none."""
    return f" (not tried: {'; '.join(reasons)})" if reasons else ""


def why_not(found: Estimate, margin_frac: float) -> str:
    """One clause: what does not fit in an estimate."""
    used, capacity = found.used_peak_bytes, found.capacity_bytes
    limit = limit_bytes(capacity, margin_frac)
    if used > capacity:
        return (
            f"{found.peak.name} needs {format_bytes(used)} of {format_bytes(capacity)}: "
            f"{format_bytes(used - capacity)} too many"
        )
    if used > limit:
        return (
            f"{found.peak.name} needs {format_bytes(used)} of {format_bytes(capacity)}: "
            f"{format_bytes(used - limit)} into the margin of {margin_frac:.0%}"
        )
    return (
        f"the host needs {format_bytes(found.host_bytes_per_node)} of "
        f"{format_bytes(found.host_capacity_bytes or 0)} per node"
    )
