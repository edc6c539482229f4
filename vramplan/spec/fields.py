"""Every field that a spec may have, with what it takes and what it is for: the docstrings, read from the source."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from vramplan.errors import UnknownNameError
from vramplan.spec.layout import Layout
from vramplan.spec.run import RunSpec

_WORDS = {str: "text", int: "whole number", float: "number", bool: "true or false", dict: "mapping", Any: "any value"}
_OR_NULL = " or null"


@dataclass(frozen=True, slots=True)
class FieldHelp:
    """One key of a spec."""

    key: str
    """Dotted, as ``--set`` takes it."""
    takes: str
    """Values that it may have, in words."""
    default: str
    """As it is written in YAML; empty where a value must be given or the key is a section."""
    text: str
    """Its docstring in one line."""


def list_fields(prefix: str | None = None) -> list[FieldHelp]:
    """Every key, or those at and below ``prefix``.

    Raises:
        UnknownNameError: there is none.
    """
    every = list(_walk(RunSpec, ""))
    if prefix is None:
        return every
    found = [each for each in every if each.key == prefix or each.key.startswith(f"{prefix}.")]
    if not found:
        raise UnknownNameError(
            "field", prefix, dict.fromkeys(each.key for each in every), "(`vramplan fields` lists all)"
        )
    return found


def _walk(model: type[BaseModel], prefix: str) -> Iterator[FieldHelp]:
    texts = _docstrings(model)
    for name, info in model.model_fields.items():
        key = prefix + name
        sections = list(dict.fromkeys(each for each in _classes(info.annotation) if issubclass(each, BaseModel)))
        text = texts.get(name) or (_one_line(sections[0].__doc__ or "") if len(sections) == 1 else "")
        yield FieldHelp(key, _takes(info), _default(info), text)
        yield from _of_kinds(f"{key}.", sections) if len(sections) > 1 else _of_sections(f"{key}.", sections)
        if Layout in _classes(info.annotation):
            for degree in inspect.signature(Layout).parameters:
                yield FieldHelp(f"{key}.{degree}", "whole number", "1", _one_line(Layout.__doc__ or ""))


def _of_sections(prefix: str, sections: list[type[BaseModel]]) -> Iterator[FieldHelp]:
    for section in sections:
        yield from _walk(section, prefix)


def _of_kinds(prefix: str, sections: list[type[BaseModel]]) -> Iterator[FieldHelp]:
    """Fields of sections of which ``kind`` chooses one; each says of which kinds it is."""
    kinds = [get_args(section.model_fields["kind"].annotation) for section in sections]
    every = ", ".join(kind for each in kinds for kind in each)
    yield FieldHelp(f"{prefix}kind", every, str(sections[0].model_fields["kind"].default), "Which of them it is.")
    for section, names in zip(sections, kinds, strict=True):
        for each in _walk(section, prefix):
            if each.key != f"{prefix}kind":
                yield FieldHelp(each.key, each.takes, each.default, f"({' and '.join(names)}) {each.text}")


def _docstrings(model: type[BaseModel]) -> dict[str, str]:
    """By field, the string below it in the source of the class or of the nearest one that it inherits from."""
    texts: dict[str, str] = {}
    for kind in reversed(model.__mro__):
        if not issubclass(kind, BaseModel) or kind is BaseModel:
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, below in zip(body.body, body.body[1:], strict=False):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
            ):
                texts[field.target.id] = _one_line(str(below.value.value))
    return texts


def _one_line(text: str) -> str:
    """The docstring as YAML's users read it: ``null`` for None, no double quotes of code."""
    words = " ".join(text.split()).replace("``", "")
    return words.replace("None:", "null:").replace("None for all:", "null for all:")


def _classes(annotation: Any) -> list[type]:
    """The classes that an annotation names as a value itself (not within a mapping)."""
    if isinstance(annotation, type) and get_origin(annotation) is None:
        return [annotation]
    if get_origin(annotation) in (Union, UnionType, tuple, Annotated):
        return [found for each in get_args(annotation) for found in _classes(each)]
    return []


def _takes(info: FieldInfo) -> str:
    said = _words(info.annotation)
    bounds = " and ".join(text for each in info.metadata if (text := _bound(each)))
    bare = said.removesuffix(_OR_NULL)
    return f"{bare} {bounds}{', or null' if bare != said else ''}" if bounds else said


def _words(annotation: Any) -> str:
    """An annotation in words; ``null`` last where nothing is a value too."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation in _WORDS:
        return _WORDS[annotation]
    if origin is Literal:
        return ", ".join(str(each) for each in arguments)
    if origin is Annotated:
        return _words(arguments[0])
    if origin in (Union, UnionType):
        members = [_words(each) for each in arguments if each is not NoneType]
        return " or ".join(dict.fromkeys(members)) + (_OR_NULL if NoneType in arguments else "")
    if origin is tuple:
        number = "list of" if arguments[-1] is ... else f"{len(arguments)} x"
        return f"{number} {_words(arguments[0])}"
    return "mapping" if origin is dict else "section"


def _bound(limit: object) -> str:
    words = {Ge: ("ge", "at least"), Gt: ("gt", "above"), Le: ("le", "at most"), Lt: ("lt", "below")}
    for kind, (name, text) in words.items():
        if isinstance(limit, kind):
            return f"{text} {getattr(limit, name)}"
    return ""


def _default(info: FieldInfo) -> str:
    if info.is_required():
        return ""
    value = info.get_default(call_default_factory=True, validated_data={})
    if isinstance(value, BaseModel):
        return ""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(map(str, value))}]"
    return str(value) if value != "" else '""'
