"""Tables and hub data sets, read by ``datasets`` as a stream: one row in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from vramplan.data.forms import row_from_fields
from vramplan.data.row import Row
from vramplan.data.source import BUILTIN_PREFIX, HUB_PREFIX, checked_rows, file_rows, is_table, plain_rows, source_files
from vramplan.errors import DataError
from vramplan.spec.data import SourceSpec

_BUILDERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".json": ("json", {}),
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".parquet": ("parquet", {}),
}


def iter_rows(source: SourceSpec) -> Iterator[Row]:
    """Every row of any source, in order; all of one kind.

    Raises:
        DataError: the source cannot be read or a row is malformed.
        UnknownNameError: there is no built-in data set of that name.
    """
    return checked_rows(source, _rows(source))


def _rows(source: SourceSpec) -> Iterator[Row]:
    if source.path.startswith(BUILTIN_PREFIX):
        return plain_rows(source)
    if source.path.startswith(HUB_PREFIX):
        return _hub_rows(source)
    return chain.from_iterable(
        _table_rows(path, source) if is_table(path) else file_rows(path, source) for path in source_files(source.path)
    )


def _table_rows(path: Path, source: SourceSpec) -> Iterator[Row]:
    if not path.is_file():
        raise DataError(f"{path}: cannot be read (No such file or directory)")
    builder, options = _BUILDERS[path.suffix.lower()]
    yield from _loaded(str(path), source, builder, data_files=str(path), split="train", **options)


def _hub_rows(source: SourceSpec) -> Iterator[Row]:
    name = source.path.removeprefix(HUB_PREFIX)
    return _loaded(source.path, source, name, name=source.subset, split=source.split)


def _loaded(shown: str, source: SourceSpec, *arguments: Any, **options: Any) -> Iterator[Row]:
    from datasets import load_dataset

    number = 0
    try:
        for fields in load_dataset(*arguments, streaming=True, **options):
            number += 1
            yield row_from_fields(fields, f"{shown} row {number}", source)
    except DataError:
        raise
    except Exception as error:  # readers, file systems and the hub's client each raise their own
        place = f"{shown} after row {number}" if number else shown
        raise DataError(f"{place}: cannot be read ({_innermost(error)})") from error


def _innermost(error: BaseException) -> str:
    """The first line of the error that began it; ``datasets`` wraps it in others that say only that it failed."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
