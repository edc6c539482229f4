"""The forms in which a row can hold its text, recognised by its keys: mapping -> Row. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from vramplan.data.row import ROLES, Completion, Conversation, Row, Text, kind_of, parse_json, text_of
from vramplan.errors import DataError, nearest_names
from vramplan.spec.data import Form, SourceSpec

SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "function": "tool"}
"""Speakers of sharegpt rows that have another name in ``messages``."""
ANY_SOURCE = SourceSpec(path="")


@dataclass(frozen=True, slots=True)
class FormRule:
    """A form: the ``keys`` that a row of it must have, and how it becomes a Row."""

    keys: tuple[str, ...]
    parse: Callable[[dict[str, Any], str], Row]


def parse_row(line: str, where: str, source: SourceSpec = ANY_SOURCE) -> Row:
    """The row that one line of a JSONL file holds.

    Raises:
        DataError: the line is not a JSON object, of no known form, or a value of it is malformed.
    """
    return row_from_fields(parse_json(line, where), where, source)


def row_from_fields(fields: Mapping[str, Any], where: str, source: SourceSpec = ANY_SOURCE) -> Row:
    """The row that an object holds; keys beside those of its form are left unread.

    Raises:
        DataError: a mapped column is not there, the form is not known, or a value is malformed.
    """
    named = _rename(fields, where, source)
    form = source.form or detect_form(named, where)
    rule = FORMS[form]
    lacking = [key for key in rule.keys if key not in named]
    if lacking:
        raise DataError(f"{where}: a row of form {form} needs {_listed(lacking)}; it has {_found(fields)}")
    weight = _weight(fields, where, source.weight_column)
    row = rule.parse(named, where)
    return row if weight == 1.0 and row.form == form else replace(row, weight=weight, form=form)


def detect_form(fields: Mapping[str, Any], where: str) -> Form:
    """The form whose keys a row has.

    Raises:
        DataError: none or several have theirs.
    """
    filled = [key for key, value in fields.items() if value is not None]  # tables fill what a row lacks with None
    found = _forms_with(filled) or _forms_with(fields)
    if not found:
        known = ", or ".join(" and ".join(map(repr, rule.keys)) for rule in FORMS.values())
        raise DataError(
            f"{where}: needs {known}; it has {_found(fields)}; data.train's fields can name the columns of another form"
        )
    if len(found) > 1:
        raise DataError(f"{where}: mixes two forms ({', '.join(found)}); name one as form, or keep the keys of one")
    return found[0]


def _forms_with(keys: Collection[str]) -> list[Form]:
    return [form for form, rule in FORMS.items() if all(key in keys for key in rule.keys)]


def _rename(fields: Mapping[str, Any], where: str, source: SourceSpec) -> dict[str, Any]:
    """The row with its columns under the names of its form."""
    named = dict(fields)
    for name, column in source.fields.items():
        named[name] = _column(fields, column, where, f"fields.{name}")
        if column != name:
            named.pop(column, None)
    return named


def _column(fields: Mapping[str, Any], column: str, where: str, asked_by: str) -> Any:
    if column not in fields:
        near = nearest_names(column, fields)
        hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise DataError(f"{where}: has no column {column!r}, which {asked_by} names; it has {_found(fields)}{hint}")
    return fields[column]


def _weight(fields: Mapping[str, Any], where: str, column: str | None) -> float:
    if column is None:
        return 1.0
    value = _column(fields, column, where, "weight_column")
    try:
        weight = float(value)
    except (TypeError, ValueError):
        weight = math.nan
    if isinstance(value, bool) or not math.isfinite(weight) or weight < 0:
        raise DataError(f"{where}: the weight {column!r} must be a number at least 0, not {value!r}")
    return weight


def _conversation(fields: dict[str, Any], where: str) -> Row:
    return _checked_conversation(fields["messages"], where, "messages", "role", "content")


def _sharegpt(fields: dict[str, Any], where: str) -> Row:
    turns = fields["conversations"]
    if isinstance(turns, list) and turns and isinstance(turns[0], dict) and "role" in turns[0]:
        return _checked_conversation(turns, where, "conversations", "role", "content")
    system = fields.get("system")
    if isinstance(turns, list) and isinstance(system, str) and system.strip():
        turns = [{"from": "system", "value": system}, *turns]
    return _checked_conversation(turns, where, "conversations", "from", "value")


def _checked_conversation(turns: Any, where: str, key: str, role_key: str, content_key: str) -> Conversation:
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{where}: {key!r} must be a list of turns, not {kind_of(turns)}")
    messages = tuple(
        _message(turn, f"{where}: turn {number} of {key!r}", role_key, content_key)
        for number, turn in enumerate(turns, start=1)
    )
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError(f"{where}: {key!r} has no assistant turn, so there is nothing to learn from it")
    late = [number for number, message in enumerate(messages, start=1) if message["role"] == "system" and number > 1]
    if late:
        raise DataError(f"{where}: turn {late[0]} of {key!r} is a system turn, which may only come first")
    return Conversation(where, messages)


def _message(turn: Any, where: str, role_key: str, content_key: str) -> dict[str, str]:
    if not isinstance(turn, dict):
        raise DataError(f"{where} must be an object, not {kind_of(turn)}")
    said = turn.get(role_key)
    role = SHAREGPT_ROLES.get(str(said), said) if role_key == "from" else said
    if role not in ROLES:
        known = (*SHAREGPT_ROLES, *ROLES) if role_key == "from" else ROLES
        raise DataError(f"{where} has {role_key} {said!r}; it must be {' or '.join(known)}")
    return {"role": str(role), "content": text_of(turn, content_key, where)}


def _alpaca(fields: dict[str, Any], where: str) -> Row:
    """The instruction, with its input below it where there is one, is the user's turn (Taori et al. 2023)."""
    asked = text_of(fields, "instruction", where)
    given = fields.get("input")
    if isinstance(given, str) and given.strip():
        asked = f"{asked}\n\n{given}"
    system = fields.get("system")
    turns = [{"role": "system", "content": system}] if isinstance(system, str) and system.strip() else []
    turns += [
        {"role": "user", "content": asked},
        {"role": "assistant", "content": text_of(fields, "output", where)},
    ]
    return Conversation(where, tuple(turns))


def _completion(fields: dict[str, Any], where: str) -> Row:
    return Completion(where, text_of(fields, "prompt", where), text_of(fields, "completion", where))


def _plain_text(fields: dict[str, Any], where: str) -> Row:
    return Text(where, text_of(fields, "text", where))


def _found(fields: Mapping[str, Any]) -> str:
    return f"only {', '.join(map(repr, fields))}" if fields else "no key"


def _listed(keys: list[str]) -> str:
    return " and ".join(map(repr, keys))


FORMS: dict[Form, FormRule] = {
    "messages": FormRule(("messages",), _conversation),
    "sharegpt": FormRule(("conversations",), _sharegpt),
    "alpaca": FormRule(("instruction", "output"), _alpaca),
    "completion": FormRule(("prompt", "completion"), _completion),
    "text": FormRule(("text",), _plain_text),
}
"""In the order in which errors list them."""
CHAT_FORMS: frozenset[str] = frozenset({"messages", "sharegpt", "alpaca"})
"""Forms whose rows a chat template renders."""
