"""Where rows come from: a JSONL file, a text file, or one of the data sets that come with the package.

Reading validates every row and imports no torch, so that bad data is said before a process is started.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import resources
from pathlib import Path

from vramplan.data.row import Row, Text, parse_row
from vramplan.errors import DataError, UnknownNameError

BUILTIN_PREFIX = "builtin:"
JSONL_SUFFIXES = (".jsonl", ".ndjson")
TEXT_SUFFIXES = (".txt", ".md", ".rst")


def read_rows(source: str) -> list[Row]:
    """Every row of ``source``, in order; all of one form.

    Raises:
        DataError: the source cannot be read or a row is malformed; the text names file, line and what is wrong.
        UnknownNameError: there is no built-in data set of that name.
    """
    rows = list(_builtin_rows(source) if source.startswith(BUILTIN_PREFIX) else _file_rows(Path(source).expanduser()))
    if not rows:
        raise DataError(f"{source}: holds no rows")
    _check_one_form(rows)
    return rows


def _file_rows(path: Path) -> Iterator[Row]:
    if path.suffix.lower() in TEXT_SUFFIXES:
        text = _read_text(path)
        return iter([Text(str(path), text)] if text.strip() else [])
    if path.suffix.lower() in JSONL_SUFFIXES:
        return _jsonl_rows(_read_text(path), str(path))
    if not path.exists():
        raise DataError(f"{path}: there is no such file (data.train and data.eval take a path or builtin:NAME)")
    known = ", ".join(JSONL_SUFFIXES + TEXT_SUFFIXES)
    raise DataError(f"{path}: is of no known kind; its name must end in one of {known}")


def _read_text(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path} line {line}: is not UTF-8 text") from error


def _jsonl_rows(text: str, name: str) -> Iterator[Row]:
    # split at newlines only: U+2028 and its like are allowed inside JSON texts, and str.splitlines cuts there
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield parse_row(line, f"{name} line {number}")


def _builtin_rows(source: str) -> Iterator[Row]:
    name = source.removeprefix(BUILTIN_PREFIX)
    if name not in _BUILTIN:
        raise UnknownNameError("built-in data set", source, (BUILTIN_PREFIX + known for known in _BUILTIN))
    return _BUILTIN[name]()


def _arithmetic() -> Iterator[Row]:
    text = resources.files("vramplan.data").joinpath("builtin/arithmetic.jsonl").read_text(encoding="utf-8")
    return _jsonl_rows(text, "builtin:arithmetic")


def _python_reference() -> Iterator[Row]:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise DataError("builtin:python-reference: this Python comes without its reference (pydoc_data)") from error
    for topic, text in sorted(topics.items()):
        if text.strip():
            yield Text(f"pydoc_data.topics[{topic!r}]", text)


_BUILTIN = {"arithmetic": _arithmetic, "python-reference": _python_reference}


def _check_one_form(rows: list[Row]) -> None:
    first = rows[0]
    for row in rows:
        if type(row) is not type(first):
            raise DataError(
                f"{row.where}: is a {type(row).__name__.lower()} row, but {first.where} is a "
                f"{type(first).__name__.lower()} row; a file must keep to one form"
            )
