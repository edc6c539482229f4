"""PYTORCH_CUDA_ALLOC_CONF: the settings of torch's caching allocator that decide how many bytes it reserves."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from vramplan.errors import SpecError
from vramplan.units import MIB

UNLIMITED = 2**63 - 1
NUM_INTERVALS = 16
"""Powers of two from 1 MiB to 64 GiB that may be rounded differently (kRoundUpPowerOfTwoIntervals)."""


@dataclass(frozen=True, slots=True)
class AllocConf:
    """Settings, with torch's defaults (c10/core/AllocatorConfig.h)."""

    expandable_segments: bool = False
    """Segments grow in place by mapping pages, instead of being handed out whole."""
    max_split_bytes: int = UNLIMITED
    """``max_split_size_mb``: larger blocks are not split, and only given to requests about as large."""
    max_non_split_rounding_bytes: int = 20 * MIB
    """``max_non_split_rounding_mb``: how much larger than its request an unsplit block may be."""
    large_segment_bytes: int = 20 * MIB
    """``large_segment_size_mb``: a large pool's segment for small requests, and its page if expandable."""
    roundup_power2_divisions: tuple[int, ...] = (0,) * NUM_INTERVALS
    """For each power of two from 1 MiB on: requests are rounded up to one of this many steps between it and the next;
    0 and 1: to 512 bytes. The first holds below 1 MiB too, the last above 64 GiB."""
    garbage_collection_threshold: float = 0.0
    """Share of the allowed memory above which old cached blocks are freed; 0: never (needs a memory fraction)."""

    @classmethod
    def parse(cls, text: str) -> AllocConf:
        """The settings that a value such as ``expandable_segments:True,max_split_size_mb:128`` spells.

        Settings that change no bytes of the device (``backend``, ``pinned_*``) are passed over.

        Raises:
            SpecError: a setting is unknown, or its value cannot be.
        """
        found: dict[str, object] = {}
        for item in filter(None, _OUTSIDE_BRACKETS.split("".join(text.split()))):
            key, _, value = item.partition(":")
            if key in _IGNORED or key.startswith("pinned_"):
                continue
            if key == "per_process_memory_fraction":
                raise SpecError(f"alloc_conf: {key} lowers what a rank may use: give that as hardware.memory_cap")
            if key not in _SETTINGS:
                raise SpecError(f"alloc_conf: {key!r} is not known here; known are {', '.join(sorted(_SETTINGS))}")
            name, read = _SETTINGS[key]
            try:
                found[name] = read(value)
            except ValueError as error:
                raise SpecError(
                    f"alloc_conf: {key} cannot be {value!r}{f' ({error})' if str(error) else ''}"
                ) from error
        conf = cls(**found)  # type: ignore[arg-type]
        for key in ("max_split_size_mb", "max_non_split_rounding_mb"):
            name, _ = _SETTINGS[key]
            if name in found and getattr(conf, name) < conf.large_segment_bytes:
                raise SpecError(f"alloc_conf: {key} must be at least large_segment_size_mb")
        return conf

    def divisions_for(self, size: int) -> int:
        """``roundup_power2_divisions(size)`` of c10/core/AllocatorConfig.cpp."""
        index = size.bit_length() - 1 - (MIB.bit_length() - 1)
        return self.roundup_power2_divisions[min(max(index, 0), NUM_INTERVALS - 1)]


def _read_bool(text: str) -> bool:
    if text not in ("True", "False"):
        raise ValueError("it is True or False")
    return text == "True"


def _read_divisions(text: str) -> tuple[int, ...]:
    """``4``, or ``[256:1,512:2,>:8]``: divisions from a size in MiB on; between named sizes there are none."""
    if not text.startswith("["):
        return (_power_of_two(text),) * NUM_INTERVALS
    divisions, last = [0] * NUM_INTERVALS, 0
    for number, item in enumerate(text.strip("[]").split(",")):
        start, _, value = item.partition(":")
        steps = 0 if value == "0" else _power_of_two(value)
        if start == ">":
            divisions[last:] = [steps] * (NUM_INTERVALS - last)
            continue
        last = min(_power_of_two(start).bit_length() - 1, NUM_INTERVALS - 1)
        if number == 0:
            divisions[:last] = [steps] * last
        divisions[last] = steps
    return tuple(divisions)


def _power_of_two(text: str) -> int:
    number = int(text) if text.isdecimal() else 0
    if number < 1 or number & (number - 1):
        raise ValueError(f"{text or 'nothing'} is no power of two")
    return number


def _read_mib(text: str) -> int:
    if not text.isdecimal():
        raise ValueError("it is a number of MiB")
    return min(int(text) * MIB, UNLIMITED)


def _read_segment(text: str) -> int:
    size = _read_mib(text)
    if size <= 10 * MIB:  # kMinLargeAlloc
        raise ValueError("it is more than 10")
    return size


def _read_threshold(text: str) -> float:
    share = float(text)
    if not 0 < share < 1:
        raise ValueError("it is between 0 and 1")
    return share


_OUTSIDE_BRACKETS = re.compile(r",(?![^\[]*\])")
_IGNORED = frozenset(
    {
        "backend",
        "graph_capture_record_stream_reuse",
        "release_lock_on_cudamalloc",
        "release_lock_on_hipmalloc",
        "throw_on_cudamalloc_oom",
    }
)
_SETTINGS: dict[str, tuple[str, Callable[[str], object]]] = {
    "expandable_segments": ("expandable_segments", _read_bool),
    "garbage_collection_threshold": ("garbage_collection_threshold", _read_threshold),
    "large_segment_size_mb": ("large_segment_bytes", _read_segment),
    "max_non_split_rounding_mb": ("max_non_split_rounding_bytes", _read_mib),
    "max_split_size_mb": ("max_split_bytes", _read_mib),
    "roundup_power2_divisions": ("roundup_power2_divisions", _read_divisions),
}
