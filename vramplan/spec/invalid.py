"""pydantic's validation errors as one sentence: the key, what is wrong, what is allowed or nearest."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, get_args, get_origin

from vramplan.errors import nearest_names
from vramplan.spec.data import SOURCE_SHAPES

if TYPE_CHECKING:
    from pydantic import BaseModel, ValidationError
    from pydantic_core import ErrorDetails

_MAX_PROBLEMS = 4
_UNKNOWN_KEY = frozenset({"extra_forbidden", "unexpected_keyword_argument"})
_BOUNDS = {
    "greater_than_equal": ("ge", "at least"),
    "greater_than": ("gt", "more than"),
    "less_than_equal": ("le", "at most"),
    "less_than": ("lt", "less than"),
}


def describe_errors(model: type[BaseModel], error: ValidationError) -> str:
    """One sentence for all that ``error`` says against ``model``."""
    problems: dict[str, str] = {}
    details = error.errors(include_url=False, include_context=True)
    for detail in details:
        if detail["type"] == "too_short" and any(_is_below(other["loc"], detail["loc"]) for other in details):
            continue  # it is too short only for the members that are wrong
        path = _path(model, detail["loc"])
        problems.setdefault(
            ".".join(path), _describe(model, path, detail)
        )  # one per key: a union fails once per member
    texts = list(problems.values())
    more = f"; and {len(texts) - _MAX_PROBLEMS} more" if len(texts) > _MAX_PROBLEMS else ""
    return "; ".join(texts[:_MAX_PROBLEMS]) + more


def flags_for_numbers(model: type[BaseModel], fields: Mapping[str, Any]) -> str:
    """One sentence for every true or false that stands where another value belongs and that pydantic took for 1 or 0;
    empty where there is none. YAML reads ``yes``, ``no``, ``on`` and ``off`` so."""
    return "; ".join(_misplaced_flags([model], fields, ""))


def _misplaced_flags(kinds: list[Any], fields: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for name, value in fields.items():
        taken = [annotation for kind in kinds if (annotation := _annotation(kind, name)) is not None]
        if isinstance(value, bool) and taken and not any(_takes_flag(annotation) for annotation in taken):
            from vramplan.spec.fields import list_fields

            key = f"{prefix}{name}"
            bare = re.sub(r"\.\d+\.", ".", key)  # as fields are listed: of a list's members, without their number
            takes = next((each.takes for each in list_fields() if each.key == bare), "another value")
            yield f"{key} is {str(value).lower()} but takes {takes}"
            continue
        members = [member for annotation in taken for member in _members(annotation)]
        items = [("", value)] if isinstance(value, Mapping) else _numbered(value)
        for number, item in items:
            if isinstance(item, Mapping):
                yield from _misplaced_flags(members, item, f"{prefix}{name}{number}.")


def _numbered(value: object) -> list[tuple[str, object]]:
    return [(f".{number}", item) for number, item in enumerate(value)] if isinstance(value, list | tuple) else []


def _takes_flag(annotation: Any) -> bool:
    return annotation in (bool, Any, object) or any(_takes_flag(each) for each in get_args(annotation))


def _is_below(loc: tuple[int | str, ...], other: tuple[int | str, ...]) -> bool:
    return len(loc) > len(other) and loc[: len(other)] == other


def _describe(model: type[BaseModel], path: list[str], detail: ErrorDetails) -> str:
    key, kind = ".".join(path), detail["type"]
    context = detail.get("ctx", {})
    value = detail["input"]
    shown = reprlib.repr(value)
    if kind in _UNKNOWN_KEY:
        return _describe_unknown(model, path)
    if kind == "missing":
        return f"{key} has too few values" if isinstance(detail["loc"][-1], int) else f"{key} is missing"
    if kind == "too_long":
        return f"{key} is {shown} but must have at most {context['max_length']}"
    if kind == "literal_error":
        return f"{key} is {shown} but must be {context['expected']}{_did_you_mean(value, str(context['expected']))}"
    if kind == "union_tag_not_found":
        return f"{key} needs a 'kind': {_one_of(_tags(model, path))}"
    if kind == "union_tag_invalid" and context["tag"] in SOURCE_SHAPES:
        ways = re.findall(r"\[\w+\]", str(context["expected_tags"]))
        return f"{key} is {shown} but must be {' or '.join(SOURCE_SHAPES[way] for way in ways)}"
    if kind == "union_tag_invalid":
        allowed = str(context["expected_tags"])
        return f"{key}.kind is {context['tag']!r} but must be {_or(allowed)}{_did_you_mean(context['tag'], allowed)}"
    if kind == "too_short":
        return f"{key} is {shown} but must have at least {context['min_length']}"
    if kind in _BOUNDS:
        bound, words = _BOUNDS[kind]
        return f"{key} is {shown} but must be {words} {context[bound]}"
    if not path:  # what the fields demand of each other; showing all of them would bury it
        return detail["msg"].removeprefix("Value error, ")
    if kind == "value_error":
        return _own_words(key, detail["msg"].removeprefix("Value error, "))
    return f"{key} is {shown}{_demand(detail)}"


def _own_words(key: str, message: str) -> str:
    """What a check of ours says of a key, or of a section's fields, whose names it may begin with."""
    if message.startswith(f"{key}."):
        return message
    return f"{key}.{message}" if re.match(r"\w+: ", message) else f"{key}: {message}"


def _describe_unknown(model: type[BaseModel], path: list[str]) -> str:
    known = list(_known_keys(model, path[:-1]))
    if path[-1] in known:  # of another kind of the section
        return f"{'.'.join(path)} is no key of the kind that {'.'.join(path[:-1])} is; `vramplan fields` tells whose"
    nearest = nearest_names(path[-1], known)
    near = f"; did you mean {' or '.join(nearest)}?" if nearest else f"; known: {', '.join(sorted(known))}"
    section = f" in {'.'.join(path[:-1])}" if path[:-1] else ""
    return f"unknown key {path[-1]!r}{section}{near}"


def _known_keys(model: type[BaseModel], path: list[str]) -> Iterator[str]:
    """Field names allowed at ``path`` below ``model``, of every member of a union."""
    types: list[Any] = [model]
    for key in path:
        if any(
            key in _fields(kind) for kind in types
        ):  # else it is of a mapping, whose values' types are there already
            types = [member for kind in types for member in _members(_annotation(kind, key))]
    for kind in types:
        yield from _fields(kind)


def _fields(kind: Any) -> dict[str, Any]:
    """Fields of a pydantic model or of a dataclass, by name; nothing for other types."""
    if hasattr(kind, "model_fields"):
        return {name: info.annotation for name, info in kind.model_fields.items()}
    return dict(getattr(kind, "__dataclass_fields__", {}))


def _annotation(kind: Any, key: str) -> Any:
    return _fields(kind).get(key)


def _members(annotation: Any) -> Iterator[Any]:
    """The classes that an annotation names: through ``Annotated``, unions and ``None``."""
    inner = [argument for argument in get_args(annotation) if isinstance(argument, type) or get_args(argument)]
    if not inner:
        yield annotation
    for argument in inner:
        yield from _members(argument)


def _tags(model: type[BaseModel], path: list[str]) -> list[str]:
    tags: list[str] = []
    for kind in _members(_annotation(model, path[0])) if len(path) == 1 else ():
        tags.extend(str(tag) for tag in get_args(_annotation(kind, "kind")))
    return tags


def _path(model: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    """pydantic's location without what users never wrote: union tags and type names."""
    path: list[str] = []
    types: list[Any] = [model]
    is_free = False
    for part in loc:
        key = str(part)
        if is_free:  # a key of a mapping, which the user chose
            path.append(key)
            is_free = False
            continue
        fields = [kind for kind in types if key in _fields(kind)]
        if fields:
            path.append(key)
            is_free = any(get_origin(_annotation(kind, key)) is dict for kind in fields)
            types = [member for kind in fields for member in _members(_annotation(kind, key))]
        elif part == loc[-1] and any(map(_fields, types)) and not _is_type_label(key):
            path.append(key)
    return path


def _is_type_label(key: str) -> bool:
    return key in {"str", "int", "float", "bool"} or "[" in key


def _did_you_mean(value: object, allowed: str) -> str:
    names = [name.strip(" '") for part in allowed.split(" or ") for name in part.split(",")]
    nearest = nearest_names(str(value), names, count=1)
    return f"; did you mean {nearest[0]}?" if nearest else ""


def _one_of(names: list[str]) -> str:
    return ", ".join(names[:-1]) + f" or {names[-1]}" if len(names) > 1 else "".join(names)


def _or(allowed: str) -> str:
    """``'a', 'b', 'c'`` -> ``'a', 'b' or 'c'``."""
    head, comma, last = allowed.rpartition(", ")
    return f"{head} or {last}" if comma else allowed


_PLAIN_DEMANDS = {
    "a valid boolean": "true or false",
    "a valid string": "text",
    "a valid tuple": "a list",
    "a valid list": "a list",
    "a valid dictionary": "a mapping of keys",
}
"""Where pydantic's words are not those of YAML's users."""


def _demand(detail: ErrorDetails) -> str:
    """pydantic's own words, made to follow ``KEY is VALUE``."""
    if detail["type"].startswith(("model_", "dict_", "dataclass_")):
        return " but must be a mapping of keys"
    message = detail["msg"]
    demand = message.removeprefix("Input should be ").partition(", unable to ")[0]
    demand = _PLAIN_DEMANDS.get(demand, demand)
    return f" but must be {demand}" if demand != message else f": {message[:1].lower()}{message[1:]}"
