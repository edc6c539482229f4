"""A row of training data: a conversation, a prompt with its completion, or plain text. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vramplan.errors import DataError

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns in order; ``where`` names file and line for errors, as in every kind of row."""

    where: str
    messages: tuple[dict[str, str], ...]
    """Each with ``role`` and ``content``, as chat templates want them."""


@dataclass(frozen=True, slots=True)
class Completion:
    """A prompt, of which nothing is learnt, and the text that must follow it."""

    where: str
    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class Text:
    """A document of raw text, every token of which is learnt."""

    where: str
    text: str


Row = Conversation | Completion | Text


def parse_row(line: str, where: str) -> Row:
    """The row that one line of a JSONL file holds; keys beside those of its form are left unread.

    Raises:
        DataError: the line is not JSON, not an object, of no known form, or a value of it is malformed.
    """
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: is not valid JSON ({error.msg} at column {error.colno})") from error
    if not isinstance(fields, dict):
        raise DataError(f"{where}: is JSON, but {_kind(fields)} instead of an object")
    forms = [parse for keys, parse in _FORMS if all(key in fields for key in keys)]
    if not forms:
        found = f"only {', '.join(map(repr, fields))}" if fields else "no key"
        raise DataError(f"{where}: needs 'messages', or 'prompt' and 'completion', or 'text'; it has {found}")
    if len(forms) > 1:
        raise DataError(f"{where}: mixes two forms; keep one of 'messages', 'prompt' with 'completion', 'text'")
    return forms[0](fields, where)


def _conversation(fields: dict[str, Any], where: str) -> Row:
    turns = fields["messages"]
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{where}: 'messages' must be a list of turns, not {_kind(turns)}")
    messages = tuple(_message(turn, number, where) for number, turn in enumerate(turns, start=1))
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError(f"{where}: 'messages' has no assistant turn, so there is nothing to learn from it")
    late = [number for number, message in enumerate(messages, start=1) if message["role"] == "system" and number > 1]
    if late:
        raise DataError(f"{where}: turn {late[0]} of 'messages' is a system turn, which may only come first")
    return Conversation(where, messages)


def _message(turn: Any, number: int, where: str) -> dict[str, str]:
    if not isinstance(turn, dict):
        raise DataError(f"{where}: turn {number} of 'messages' must be an object, not {_kind(turn)}")
    role = turn.get("role")
    if role not in ROLES:
        raise DataError(f"{where}: turn {number} of 'messages' has role {role!r}; it must be {' or '.join(ROLES)}")
    return {"role": role, "content": _text(turn, "content", f"{where}: turn {number} of 'messages'")}


def _completion(fields: dict[str, Any], where: str) -> Row:
    return Completion(where, _text(fields, "prompt", where), _text(fields, "completion", where))


def _plain_text(fields: dict[str, Any], where: str) -> Row:
    return Text(where, _text(fields, "text", where))


def _text(fields: dict[str, Any], key: str, where: str) -> str:
    value = fields.get(key)
    if not isinstance(value, str):
        raise DataError(f"{where}: {key!r} must be text, not {_kind(value)}")
    if not value.strip():
        raise DataError(f"{where}: {key!r} is empty")
    return value


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    if value in ([], {}):
        return "an empty list" if value == [] else "an empty object"
    return names.get(type(value), "nothing")


_FORMS: tuple[tuple[tuple[str, ...], Callable[[dict[str, Any], str], Row]], ...] = (
    (("messages",), _conversation),
    (("prompt", "completion"), _completion),
    (("text",), _plain_text),
)
