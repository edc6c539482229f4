"""The catalogue of GPUs, found by the loose names that people use."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

from vramplan.errors import AmbiguousNameError, UnknownNameError, nearest_names
from vramplan.facts.device import Device

# Words of a device's name that a query may leave out: vendor, series, form factor, memory. Every other word ("ti",
# "nvl", "ada") makes it another device, so a query without it does not mean that device.
_VENDOR_WORDS = {"nvidia", "amd", "intel", "geforce", "tesla", "instinct", "rtx", "gpu"}
_FORM_WORDS = {"sxm", "sxm2", "sxm4", "pcie", "hbm3", "generation", "blackwell", "server", "edition", "per", "gcd"}
_OPTIONAL_WORDS = frozenset(_VENDOR_WORDS | _FORM_WORDS)
_MEMORY_WORD = re.compile(r"^[0-9]+gb$")
_WORD = re.compile(r"[a-z0-9]+")


@cache
def all_devices() -> tuple[Device, ...]:
    """Every device, in the order of the data file."""
    text = Path(__file__).with_name("data").joinpath("gpus.json").read_text(encoding="utf-8")
    return tuple(_device(row) for row in json.loads(text))


def list_devices(pattern: str | None = None) -> tuple[Device, ...]:
    """Devices that ``pattern`` could mean, else those whose name holds it."""
    if not pattern or not pattern.strip():
        return all_devices()
    meant = tuple(device for device in all_devices() if _could_mean(pattern, device, complete=False))
    needle = pattern.strip().lower()
    return meant or tuple(device for device in all_devices() if needle in device.name.lower())


def find_device(name: str) -> Device:
    """The device that a name such as ``h100-80gb``, ``H100``, ``a100-40gb`` or ``rtx4090`` means.

    Where form factors of one card have the same memory, the SXM one is taken (``H100``); where their memory differs
    the name is ambiguous (``A100``).

    Raises:
        UnknownNameError: no device matches.
        AmbiguousNameError: several with different memory do.
    """
    found = [device for device in all_devices() if _could_mean(name, device, complete=True)]
    if not found:
        raise _unknown(name)
    if len({device.raw["memory_nominal_gb"] for device in found}) > 1:
        raise AmbiguousNameError(
            "GPU", name, (device.name for device in found), hint="add its memory, such as " + _with_memory(name, found)
        )
    return next((device for device in found if "SXM" in device.name), found[0])


def _with_memory(name: str, found: list[Device]) -> str:
    sizes = sorted({int(str(device.raw["memory_nominal_gb"])) for device in found})
    return " or ".join(f"{name}-{size}gb" for size in sizes)


def _unknown(name: str) -> UnknownNameError:
    """An error with the nearest names: devices that the words leave open, else those spelt alike."""
    partial = [device.name for device in all_devices() if name.strip() and _could_mean(name, device, complete=False)]
    if 0 < len(partial) <= 4:
        return UnknownNameError("GPU", name, (), hint=f"(did you mean {' or '.join(partial)}?)")
    names = {"-".join(sorted(_distinguishing(device), reverse=True)): device.name for device in all_devices()}
    model = "".join(word for word in _WORD.findall(name.lower()) if word not in _OPTIONAL_WORDS)
    near = [names[match] for match in nearest_names(model, names)] if model else []
    hint = f"(did you mean {' or '.join(near)}?)" if near else "(see `vramplan gpus`)"
    return UnknownNameError("GPU", name, (), hint=hint)


def _could_mean(query: str, device: Device, *, complete: bool) -> bool:
    """Whether the query is made of words of the device; ``complete``: and names all its distinguishing words."""
    words = _words(device)
    used = _split_into("".join(_WORD.findall(query.lower())), words)
    if used is None:
        return False
    return bool(used) and (not complete or _distinguishing(device) <= used)


def _distinguishing(device: Device) -> frozenset[str]:
    """Words without which a query means another device."""
    words = _WORD.findall(device.name.lower())
    return frozenset(word for word in words if word not in _OPTIONAL_WORDS and not _MEMORY_WORD.match(word))


def _words(device: Device) -> frozenset[str]:
    """Words that may stand for the device: those of its name, its memory, and its form factor without a number."""
    words = set(_WORD.findall(device.name.lower()))
    memory = device.raw["memory_nominal_gb"]
    words |= {f"{memory}gb", f"{memory}g", str(device.raw["vendor"]).lower()}
    if any(word.startswith("sxm") for word in words):
        words |= {"sxm", "sxm5", "sxm6"} if "sxm" in words else {"sxm"}
    return frozenset(words)


def _split_into(text: str, words: frozenset[str]) -> frozenset[str] | None:
    """The words that ``text`` is a concatenation of, each used at most once; None where it is none."""
    if not text:
        return frozenset()
    for word in sorted(words, key=len, reverse=True):
        if text.startswith(word):
            rest = _split_into(text[len(word) :], words - {word})
            if rest is not None:
                return rest | {word}
    return None


def _device(row: dict[str, Any]) -> Device:
    capability = row.get("compute_capability", "")
    sources = dict.fromkeys(source for source in row["sources"].values() if source != "public file")
    memory_basis = f"memory: {row['memory_usable_basis']}"
    return Device(
        name=row["name"],
        kind=row["kind"],
        memory_bytes=row["memory_bytes"],
        usable_bytes=row["memory_usable_bytes"],
        bf16_flops=_scaled(row.get("bf16_tflops_dense") or row.get("fp16_tflops_dense"), 1e12),
        fp32_flops=_scaled(row.get("fp32_tflops"), 1e12),
        memory_bandwidth=_scaled(row.get("memory_bandwidth_gbps"), 1e9),
        link_bandwidth=_scaled(row.get("nvlink_gbps_bidirectional"), 1e9),
        compute_capability=_capability(capability),
        source="; ".join((memory_basis, *sources)),
        note=row.get("note", ""),
        raw=row,
    )


def _scaled(value: float | None, unit: float) -> float | None:
    return None if value is None else value * unit


def _capability(text: str) -> tuple[int, int] | None:
    """``"9.0"`` -> ``(9, 0)``; AMD's ``gfx`` names have none."""
    major, dot, minor = text.partition(".")
    return (int(major), int(minor)) if dot and major.isdigit() and minor.isdigit() else None
