"""``vramplan gpus``: the catalogue of devices and what their drivers really offer."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from vramplan.cli import tables
from vramplan.facts.device import Device
from vramplan.facts.devices import find_device, list_devices
from vramplan.units import format_bytes

FULL_SOURCES_UP_TO = 6
"""Rows up to which the table is followed by each row's sources in full."""


def gpus(
    pattern: Annotated[str | None, typer.Argument(help="A GPU's name, or part of it, such as h100 or rtx4090.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print a list of objects.")] = False,
) -> None:
    """List the catalogue of GPUs."""
    # find_device raises the error with the nearest names when nothing is listed.
    devices = list_devices(pattern) or (find_device(pattern or ""),)
    if json:
        tables.print_json([_as_object(device) for device in devices])
    else:
        _print_table(devices)


def _as_object(device: Device) -> dict[str, Any]:
    return {
        "name": device.name,
        "kind": device.kind,
        "memory_nominal_gb": device.raw["memory_nominal_gb"],
        "memory_bytes": device.memory_bytes,
        "usable_bytes": device.usable_bytes,
        "usable_basis": device.raw["memory_usable_basis"],
        "bf16_flops": device.bf16_flops,
        "fp32_flops": device.fp32_flops,
        "memory_bandwidth_bytes_per_s": device.memory_bandwidth,
        "link_bandwidth_bytes_per_s": device.link_bandwidth,
        "compute_capability": device.raw.get("compute_capability"),
        "source": device.source,
        "sources": device.raw["sources"],
        "note": device.note,
    }


def _print_table(devices: tuple[Device, ...]) -> None:
    table = tables.make_table(
        "GPU", "driver says >", "torch gets >", "16-bit TFLOP/s >", "memory GB/s >", "link GB/s >", "torch's figure is"
    )
    for device in devices:
        table.add_row(
            device.name,
            format_bytes(device.memory_bytes),
            format_bytes(device.usable_bytes),
            _in(1e12, device.bf16_flops),
            _in(1e9, device.memory_bandwidth),
            _in(1e9, device.link_bandwidth),
            str(device.raw["memory_usable_basis"]),
        )
    tables.print_table(table)
    if len(devices) > FULL_SOURCES_UP_TO:
        tables.print_note("Sources in full and remarks: narrow the pattern, or --json.")
        return
    for device in devices:
        tables.print_note(f"{device.name}: {'; '.join(filter(None, (device.source, device.note)))}")


def _in(unit: float, value: float | None) -> str:
    """The value in that unit, or a dash where nobody published it."""
    return "-" if value is None else f"{value / unit:g}"
