"""Tables and hub data sets, read by ``datasets`` as a stream: one row in memory at a time."""

from __future__ import annotations

import warnings
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
    builder, options = _BUILDERS[path.suffix.lower()]
    if builder == "csv":
        options = {**options, **_as_text(path, **options)}
    yield from _loaded(str(path), source, builder, data_files=str(path), split="train", **options)


def _as_text(path: Path, sep: str = ",") -> dict[str, Any]:
    """Options with which every cell of a CSV file is read as the text that it is: a label 007 is no number, and an
    answer None is not missing. (``datasets`` hands them to ``pandas.read_csv``, which guesses otherwise.)

    Raises:
        DataError: the first row has more cells than the header names, for which pandas would shift the names.
    """
    import pandas

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pandas.errors.ParserWarning)
            header = pandas.read_csv(path, sep=sep, nrows=1, dtype=object, index_col=False).columns
    except pandas.errors.ParserWarning as error:
        raise DataError(f"{path} row 1: has more cells than the header has names") from error
    except pandas.errors.EmptyDataError as error:
        raise DataError(f"{path}: holds no rows") from error
    except (OSError, ValueError) as error:  # UnicodeDecodeError and ParserError are ValueErrors
        raise DataError(f"{path}: cannot be read ({_innermost(error)})") from error
    return {"converters": dict.fromkeys(header, _cell), "keep_default_na": False, "index_col": False}


def _cell(text: str) -> str | None:
    return text or None


def _hub_rows(source: SourceSpec) -> Iterator[Row]:
    name = source.path.removeprefix(HUB_PREFIX)
    return _loaded(source.path, source, name, name=source.subset, split=source.split)


def _loaded(shown: str, source: SourceSpec, *arguments: Any, **options: Any) -> Iterator[Row]:
    from datasets import load_dataset

    number = 0
    try:
        rows = load_dataset(*arguments, streaming=True, **options)
        if rows.features is None and not options.get("data_files"):
            rows = rows._resolve_features()  # else values of unlike kinds in one column come as JSON, undecoded
        for fields in rows:
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
