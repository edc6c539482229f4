"""A row of training data: a conversation, a prompt with its completion, or plain text. Imports no torch."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from vramplan.errors import DataError

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns in order; ``where`` names file and line for errors, as in every kind of row."""

    where: str
    messages: tuple[dict[str, str], ...]
    """Each with ``role`` and ``content``, as chat templates want them."""
    weight: float = 1.0
    """How much its tokens count in the loss, as in every kind of row."""
    form: str = field(default="messages", compare=False)
    """The form in which the row was given, as in every kind of row."""


@dataclass(frozen=True, slots=True)
class Completion:
    """A prompt, of which nothing is learnt, and the text that must follow it."""

    where: str
    prompt: str
    completion: str
    weight: float = 1.0
    form: str = field(default="completion", compare=False)


@dataclass(frozen=True, slots=True)
class Text:
    """A document of raw text, every token of which is learnt."""

    where: str
    text: str
    weight: float = 1.0
    form: str = field(default="text", compare=False)


Row = Conversation | Completion | Text


def parse_json(line: str, where: str) -> dict[str, Any]:
    """The object that one line of a JSONL file holds.

    Raises:
        DataError: the line is not JSON or not an object.
    """
    fields = load_json(line, where)
    if not isinstance(fields, dict):
        raise DataError(f"{where}: is JSON, but {kind_of(fields)} instead of an object")
    return fields


def load_json(text: str, where: str) -> Any:
    """What a JSON text says.

    Raises:
        DataError: it is not JSON.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno} " if "\n" in text else ""
        raise DataError(f"{where}: is not valid JSON ({error.msg} at {line}column {error.colno})") from error


def text_of(fields: dict[str, Any], key: str, where: str) -> str:
    """The text under ``key``.

    Raises:
        DataError: it is no text, or empty.
    """
    value = fields.get(key)
    if not isinstance(value, str):
        raise DataError(f"{where}: {key!r} must be text, not {kind_of(value)}")
    if not value.strip():
        raise DataError(f"{where}: {key!r} is empty")
    return value


def kind_of(value: object) -> str:
    """A value's type in words."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    if value in ([], {}):
        return "an empty list" if value == [] else "an empty object"
    return "nothing" if value is None else names.get(type(value), f"a {type(value).__name__}")
