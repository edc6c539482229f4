"""PYTORCH_CUDA_ALLOC_CONF: the settings of torch's caching allocator that decide how many bytes it reserves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vramplan.errors import SpecError
from vramplan.units import MIB

UNLIMITED = 2**63 - 1


@dataclass(frozen=True, slots=True)
class AllocConf:
    """Settings, with torch's defaults (c10/core/AllocatorConfig.h)."""

    expandable_segments: bool = False
    """Segments grow in place by mapping pages, instead of being handed out whole."""
    max_split_bytes: int = UNLIMITED
    """``max_split_size_mb``: larger blocks are not split, and only given to requests about as large."""
    roundup_power2_divisions: int = 0
    """Requests are rounded up to one of this many steps between powers of two; 0: to 512 bytes."""
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
        for item in filter(None, (part.strip() for part in text.split(","))):
            key, _, value = item.partition(":")
            if key in _IGNORED or key.startswith("pinned_"):
                continue
            if key not in _SETTINGS:
                raise SpecError(f"alloc_conf: {key!r} is not known here; known are {', '.join(sorted(_SETTINGS))}")
            name, read = _SETTINGS[key]
            try:
                found[name] = read(value)
            except ValueError as error:
                raise SpecError(f"alloc_conf: {key} cannot be {value!r}") from error
        return cls(**found)  # type: ignore[arg-type]


def _read_bool(text: str) -> bool:
    if text not in ("True", "False"):
        raise ValueError(text)
    return text == "True"


def _read_divisions(text: str) -> int:
    divisions = int(text)
    if divisions & (divisions - 1):
        raise ValueError(text)
    return divisions


def _read_split(text: str) -> int:
    size = int(text) * MIB
    if size < 20 * MIB:  # kLargeBuffer: torch refuses less
        raise ValueError(text)
    return size


_IGNORED = frozenset(
    {"backend", "release_lock_on_cudamalloc", "release_lock_on_hipmalloc", "graph_capture_record_stream_reuse"}
)
_SETTINGS: dict[str, tuple[str, Callable[[str], object]]] = {
    "expandable_segments": ("expandable_segments", _read_bool),
    "max_split_size_mb": ("max_split_bytes", _read_split),
    "roundup_power2_divisions": ("roundup_power2_divisions", _read_divisions),
    "garbage_collection_threshold": ("garbage_collection_threshold", float),
}
