"""``vramplan models``: the catalogue of models as the calculator counts them."""

from __future__ import annotations

import re
from typing import Annotated, Any

import typer

from vramplan.cli import tables
from vramplan.errors import ConfigError, UnknownNameError
from vramplan.facts.architecture import Architecture
from vramplan.facts.catalogue import ModelEntry, all_models, list_models
from vramplan.facts.families import architecture_from_config

FULL_SOURCES_UP_TO = 12
"""Rows up to which the table is followed by each row's source in full."""


def models(
    pattern: Annotated[str | None, typer.Argument(help="Words that the name or family must hold.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print a list of objects.")] = False,
) -> None:
    """List the catalogue of models."""
    entries = list_models(pattern)
    if not entries:
        raise UnknownNameError(
            "model", pattern or "", (entry.name for entry in all_models()), hint="(see `vramplan models`)"
        )
    rows = [(entry, _counted(entry)) for entry in entries]
    if json:
        tables.print_json([_as_object(entry, counted) for entry, counted in rows])
    else:
        _print_table(rows, with_sources=len(rows) <= FULL_SOURCES_UP_TO)


def _counted(entry: ModelEntry) -> Architecture | str:
    """The model's blocks, or why the calculator has none for it."""
    try:
        return architecture_from_config(entry.config)
    except (ConfigError, UnknownNameError) as error:
        return str(error)


def _as_object(entry: ModelEntry, counted: Architecture | str) -> dict[str, Any]:
    return {
        "name": entry.name,
        "model_type": entry.model_type,
        **(_sizes(counted) if isinstance(counted, Architecture) else _no_sizes(counted)),
        "params_published": [{"count": item.count, "source": item.source} for item in entry.params_published],
        "params_verified": entry.params_verified,
        "source": entry.source,
        "confidence": entry.confidence,
        "unsure": list(entry.unsure),
        "note": entry.note,
    }


def _sizes(architecture: Architecture) -> dict[str, Any]:
    return {
        "params_total": architecture.num_params,
        "params_by_role": {role.value: count for role, count in architecture.params_by_role.items() if count},
        "num_layers": architecture.num_layers,
        "hidden_size": architecture.hidden_size,
        "vocab_size": architecture.vocab_size,
        "max_positions": architecture.max_positions,
        "tied_embeddings": architecture.tied_embeddings,
    }


def _no_sizes(reason: str) -> dict[str, Any]:
    return {"params_total": None, "not_counted_because": reason}


def _print_table(rows: list[tuple[ModelEntry, Architecture | str]], *, with_sources: bool) -> None:
    table = tables.make_table(
        "model", "family", "params >", "layers >", "hidden >", "vocab >", "positions >", "config from"
    )
    for entry, counted in rows:
        if isinstance(counted, Architecture):
            sizes = [counted.num_layers, counted.hidden_size, counted.vocab_size, counted.max_positions]
            cells = [f"{counted.num_params:,}", *map(str, sizes)]
        else:
            cells = ["not counted", "", "", "", ""]
        table.add_row(entry.name, entry.model_type, *cells, _origin(entry.source))
    tables.print_table(table)
    if not with_sources:
        tables.print_note("Sources in full and remarks: narrow the pattern, or --json.")
        return
    for entry, counted in rows:
        remarks = [entry.source, _published(entry), entry.note, counted if isinstance(counted, str) else ""]
        tables.print_note(f"{entry.name}: {'; '.join(filter(None, remarks))}")


def _origin(source: str) -> str:
    """Who published the config: the repository or paper that a source begins with."""
    return re.split(r":|;| \(|,", source, maxsplit=1)[0]


def _published(entry: ModelEntry) -> str:
    counts = ", ".join(f"{item.count:,} ({item.source})" for item in entry.params_published)
    return f"published: {counts}; agreement: {entry.params_verified}" if counts else ""
