"""The catalogue of models: their ``config.json`` fields, and who published what about them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from vramplan.errors import UnknownNameError


@dataclass(frozen=True, slots=True)
class PublishedCount:
    """A number of parameters that somebody published."""

    count: int
    source: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """One model of the catalogue. Its number of parameters is not here: the calculator counts it."""

    name: str
    config: dict[str, Any] = field(hash=False, repr=False)
    source: str
    """Where ``config`` was read."""
    params_published: tuple[PublishedCount, ...] = ()
    params_verified: str = ""
    """How the published counts agree with what transformers builds."""
    confidence: str = ""
    """What kind of copy ``config`` is."""
    unsure: tuple[str, ...] = ()
    """Fields of ``config`` that sources disagree about."""
    note: str = ""

    @property
    def model_type(self) -> str:
        return str(self.config["model_type"])


@cache
def all_models() -> tuple[ModelEntry, ...]:
    """Every entry, in the order of the data file (by family)."""
    text = Path(__file__).with_name("data").joinpath("models.json").read_text(encoding="utf-8")
    return tuple(_entry(row) for row in json.loads(text))


def list_models(pattern: str | None = None) -> tuple[ModelEntry, ...]:
    """Entries whose name or model type holds ``pattern`` (without case; spaces separate words that all must occur)."""
    words = (pattern or "").lower().split()
    return tuple(
        entry for entry in all_models() if all(word in f"{entry.name} {entry.model_type}".lower() for word in words)
    )


_WHERE_MODELS_ARE = "(`vramplan models` lists those known; a local directory with a config.json works too)"


def find_model(name: str) -> ModelEntry:
    """The entry of that name: in full, or without its owner where that is unique; case does not matter.

    Raises:
        UnknownNameError: no entry has it, or several owners have one.
    """
    found = _matches(name, all_models())
    if len(found) == 1:
        return found[0]
    hint = f"(it could be any of {', '.join(entry.name for entry in found)})" if found else _WHERE_MODELS_ARE
    raise UnknownNameError("model", name, (entry.name for entry in all_models()), hint=hint)


def _matches(name: str, entries: Iterable[ModelEntry]) -> list[ModelEntry]:
    wanted = name.strip().lower()
    by_tail = []
    for entry in entries:
        full = entry.name.lower()
        if full == wanted:
            return [entry]
        if full.split("/")[-1] == wanted:
            by_tail.append(entry)
    return by_tail


def _entry(row: dict[str, Any]) -> ModelEntry:
    published = tuple(
        PublishedCount(item["count"], item["source"], item.get("note", "")) for item in row.get("params_published", ())
    )
    return ModelEntry(
        name=row["name"],
        config=row["config"],
        source=row["source"],
        params_published=published,
        params_verified=row.get("params_verified", ""),
        confidence=row.get("confidence", ""),
        unsure=tuple(row.get("unsure", ())),
        note=row.get("note", ""),
    )
