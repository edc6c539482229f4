"""Where rows come from: JSON and text files, directories, globs, and the data sets that come with the package.

Reading validates every row and imports no torch, so that bad data is said before a process is started. Tables and hub
data sets are read by ``datasets`` in ``tables.py``. JSON is not: ``datasets`` guesses types that JSON has not (its
``packaged_modules/json/json.py``: texts that look like dates become times, and where one value of a column is no text
all of the column comes as JSON, in quotation marks).
"""

from __future__ import annotations

import glob
import json
from collections.abc import Callable, Iterable, Iterator
from importlib import resources
from pathlib import Path

from vramplan.data.forms import ANY_SOURCE, parse_row, row_from_fields
from vramplan.data.row import Row, Text, kind_of, load_json
from vramplan.errors import DataError, UnknownNameError
from vramplan.spec.data import SourceSpec, as_source

BUILTIN_PREFIX = "builtin:"
HUB_PREFIX = "hub:"
JSONL_SUFFIXES = (".jsonl", ".ndjson")
TEXT_SUFFIXES = (".txt", ".md", ".rst")
JSON_SUFFIX = ".json"
TABLE_SUFFIXES = (".csv", ".tsv", ".parquet")


def read_rows(source: str | SourceSpec) -> list[Row]:
    """Every row of ``source`` (no table), in order; all of one kind.

    Raises:
        DataError: the source cannot be read or a row is malformed; the text names file, line and what is wrong.
        UnknownNameError: there is no built-in data set of that name.
    """
    spec = as_source(source)
    return list(checked_rows(spec, plain_rows(spec)))


def check_rows(source: SourceSpec) -> None:
    """Reads what can be read without the training stack, for its errors; of tables only that they are there."""
    if source.path.startswith(HUB_PREFIX):
        return
    if source.path.startswith(BUILTIN_PREFIX) or not any(map(is_table, source_files(source.path))):
        for _ in checked_rows(source, plain_rows(source)):
            pass


def check_present(path: str) -> None:
    """Looks whether something is where ``path`` says, without reading it; of a hub's data set it is not asked.

    Raises:
        DataError: nothing is there, or a file is of no known kind.
        UnknownNameError: there is no built-in data set of that name.
    """
    if path.startswith(BUILTIN_PREFIX):
        _builtin(path)
    elif not path.startswith(HUB_PREFIX):
        source_files(path)


def plain_rows(source: SourceSpec) -> Iterator[Row]:
    """Rows of a built-in data set or of JSON and text files.

    Raises:
        DataError, UnknownNameError: as in ``read_rows``.
    """
    if source.path.startswith(BUILTIN_PREFIX):
        yield from _builtin(source.path)(source)
        return
    for path in source_files(source.path):
        yield from file_rows(path, source)


def checked_rows(source: SourceSpec, rows: Iterable[Row]) -> Iterator[Row]:
    """The rows as they come.

    Raises:
        DataError: there is none, or two are of different kinds.
    """
    first: Row | None = None
    for row in rows:
        if first is None:
            first = row
        elif type(row) is not type(first):
            raise DataError(
                f"{row.where}: is a {type(row).__name__.lower()} row, but {first.where} is a "
                f"{type(first).__name__.lower()} row; a file must keep to one form"
            )
        yield row
    if first is None:
        raise DataError(f"{source.path}: holds no rows")


def source_files(name: str) -> list[Path]:
    """The files that a path, a directory (of files of known kinds, at any depth) or a glob names, sorted.

    Raises:
        DataError: nothing is there, or a file is of no known kind.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.is_file() and _is_known(file))
        if not found:
            raise DataError(f"{path}: the directory holds no file whose name ends in one of {_KNOWN}")
        return found
    if not path.exists() and glob.has_magic(name):
        found = sorted(Path(match) for match in glob.glob(str(path), recursive=True) if Path(match).is_file())
        if not found:
            raise DataError(f"{name}: no file matches it")
        return [_known(file) for file in found]
    return [_known(path)]


def is_table(path: Path) -> bool:
    """Whether ``datasets`` must read the file."""
    return path.suffix.lower() in TABLE_SUFFIXES


def file_rows(path: Path, source: SourceSpec = ANY_SOURCE) -> Iterator[Row]:
    """Rows of one JSON or text file (a text file is one document).

    Raises:
        DataError: it cannot be read or a row is malformed.
    """
    if is_table(path):
        raise DataError(f"{path}: is a table, which only the trainer reads; give JSON or a text file here")
    if path.suffix.lower() in TEXT_SUFFIXES:
        text = b"".join(_read_lines(path)).decode("utf-8-sig")
        if text.strip():
            yield Text(str(path), text)
    elif path.suffix.lower() == JSON_SUFFIX and not _is_json_lines(path):
        yield from _whole_json_rows(path, source)
    else:
        yield from _json_line_rows(path, source)


def _json_line_rows(path: Path, source: SourceSpec) -> Iterator[Row]:
    for number, line in enumerate(_read_lines(path), start=1):
        # cut at newlines only: U+2028 and its like are allowed inside JSON texts, and str.splitlines cuts there
        if line.strip():
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip()
            yield parse_row(text, f"{path} line {number}", source)


def _is_json_lines(path: Path) -> bool:
    """Whether a ``.json`` file, as many are, has an object of its own in each line."""
    first = next((line for line in _read_lines(path) if line.strip()), b"[]")
    try:
        return isinstance(json.loads(first.decode("utf-8-sig")), dict)
    except ValueError:
        return False


def _whole_json_rows(path: Path, source: SourceSpec) -> Iterator[Row]:
    """Rows of a file that is one JSON text: a list of objects, or of texts, or one object."""
    text = b"".join(_read_lines(path)).decode("utf-8-sig")
    found = load_json(text, str(path)) if text.strip() else []
    for number, fields in enumerate(found if isinstance(found, list) else [found], start=1):
        where = f"{path} row {number}"
        named = {"text": fields} if isinstance(fields, str) else fields
        if not isinstance(named, dict):
            raise DataError(f"{where}: is JSON, but {kind_of(fields)} instead of an object")
        yield row_from_fields(named, where, source)


def _read_lines(path: Path) -> Iterator[bytes]:
    """Lines of UTF-8, one in memory at a time."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    line.decode("utf-8")
                except UnicodeDecodeError as error:
                    raise DataError(f"{path} line {number}: is not UTF-8 text") from error
                yield line
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error


def _known(path: Path) -> Path:
    if not path.exists():
        raise DataError(
            f"{path}: there is no such file (data.train and data.eval take a path, a glob, hub:NAME or builtin:NAME)"
        )
    if not _is_known(path):
        raise DataError(f"{path}: is of no known kind; its name must end in one of {_KNOWN}")
    return path


def _is_known(path: Path) -> bool:
    return path.suffix.lower() in _KNOWN_SUFFIXES


_KNOWN_SUFFIXES = (*JSONL_SUFFIXES, JSON_SUFFIX, *TEXT_SUFFIXES, *TABLE_SUFFIXES)
_KNOWN = ", ".join(_KNOWN_SUFFIXES)


def _builtin(path: str) -> Callable[[SourceSpec], Iterator[Row]]:
    name = path.removeprefix(BUILTIN_PREFIX)
    if name not in _BUILTIN:
        raise UnknownNameError("built-in data set", path, (BUILTIN_PREFIX + known for known in _BUILTIN))
    return _BUILTIN[name]


def _packaged(source: SourceSpec) -> Iterator[Row]:
    name = source.path.removeprefix(BUILTIN_PREFIX)
    text = resources.files("vramplan.data").joinpath(f"builtin/{name}.jsonl").read_text(encoding="utf-8")
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield parse_row(line, f"{source.path} line {number}", source)


def _python_reference(source: SourceSpec) -> Iterator[Row]:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise DataError("builtin:python-reference: this Python comes without its reference (pydoc_data)") from error
    for topic, text in sorted(topics.items()):
        if text.strip():
            yield Text(f"pydoc_data.topics[{topic!r}]", text)


_BUILTIN = {"arithmetic": _packaged, "python-reference": _python_reference, "tickets": _packaged}
