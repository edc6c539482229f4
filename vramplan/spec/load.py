"""YAML files and command-line options -> RunSpec; every mistake becomes one sentence that names file and key."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vramplan.errors import SpecError
from vramplan.spec.invalid import describe_errors, flags_for_numbers
from vramplan.spec.run import RunSpec
from vramplan.spec.trainable import FullMethod

if TYPE_CHECKING:
    import yaml

_KIND_SECTIONS = ("method", "optimizer")
"""Sections that may be written as the bare name of their kind: ``method: lora``."""


def read_yaml_mapping(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds.

    Raises:
        SpecError: the file cannot be read, is not YAML, repeats a key, or is not a mapping.
    """
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{path}: cannot be read ({_reason(error)})") from error
    try:
        content = yaml.load(text, Loader=_strict_loader())
    except yaml.YAMLError as error:
        raise SpecError(f"{path}: is not valid YAML: {_yaml_reason(error)}") from error
    if not isinstance(content, dict):
        raise SpecError(f"{path}: must hold a mapping of keys such as 'model: NAME', not {_type_name(content)}")
    return content


def load_run(path: Path, overrides: Mapping[str, Any] | None = None) -> RunSpec:
    """The RunSpec of a YAML file, with ``overrides`` (nested as in the file) laid over it.

    Raises:
        SpecError: the file or an override cannot be; the text names the file, the key and the nearest known key.
    """
    fields = read_yaml_mapping(path)
    return run_from_mapping(merge(fields, overrides or {}), source=str(path))


def run_from_mapping(fields: Mapping[str, Any], source: str = "") -> RunSpec:
    """The RunSpec of a mapping such as a YAML file holds; ``source`` names it in errors.

    Raises:
        SpecError: a key is unknown, a value is not allowed, or ``model`` is missing.
    """
    from pydantic import ValidationError

    expanded = _with_default_method(expand_kinds(fields))
    try:
        run = RunSpec.model_validate(expanded)
    except ValidationError as error:
        problems = describe_errors(RunSpec, error)
        raise SpecError(f"{source}: {problems}" if source else problems) from error
    if problems := flags_for_numbers(RunSpec, expanded):
        raise SpecError(f"{source}: {problems}" if source else problems)
    return run


def _with_default_method(fields: dict[str, Any]) -> dict[str, Any]:
    """``fields`` where a ``method`` without a kind is full fine-tuning, if it has no key of adapters."""
    method = fields.get("method")
    if not isinstance(method, Mapping) or "kind" in method or not method.keys() <= FullMethod.model_fields.keys():
        return fields
    return {**fields, "method": {"kind": "full", **method}}


def expand_kinds(fields: Mapping[str, Any]) -> dict[str, Any]:
    """``fields`` with ``method: lora`` written out as ``method: {kind: lora}``, and the same for ``optimizer``; DoRA,
    which is a key of lora's, may be named as a kind."""
    expanded = dict(fields)
    for section in _KIND_SECTIONS:
        if isinstance(expanded.get(section), str):
            expanded[section] = {"kind": expanded[section]}
    method = expanded.get("method")
    if isinstance(method, Mapping) and method.get("kind") == "dora":
        expanded["method"] = {**method, "kind": "lora", "use_dora": True}
    return expanded


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with the keys of ``over`` laid over it, section by section.

    Where ``method`` changes between full and adapters it is replaced as a whole: LoRA's rank means nothing to full
    fine-tuning. All other kinds of a section have the same keys, and those that were given stay.
    """
    merged, laid = expand_kinds(base), expand_kinds(over)
    for key, value in laid.items():
        below = merged.get(key)
        if isinstance(below, Mapping) and isinstance(value, Mapping) and _same_keys(below, value):
            merged[key] = merge(below, value)
        else:
            merged[key] = value
    return merged


def parse_assignments(assignments: Iterable[str]) -> dict[str, Any]:
    """The nested mapping of texts such as ``zero.reduce_bucket_size=1e6``; values are read as YAML.

    Raises:
        SpecError: a text has no ``=`` or its value is not YAML.
    """
    import yaml

    fields: dict[str, Any] = {}
    for assignment in assignments:
        key, separator, text = assignment.partition("=")
        if not separator or not key.strip():
            raise SpecError(f"--set {assignment!r} must be KEY=VALUE, such as zero.reduce_bucket_size=50000000")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise SpecError(f"--set {assignment!r}: the value is not valid YAML: {_yaml_reason(error)}") from error
        fields = merge(fields, nest(key.strip(), value))
    return fields


def nest(name: str, value: Any) -> dict[str, Any]:
    """The nested mapping that sets one dotted name: ``zero.stage`` -> ``{"zero": {"stage": value}}``."""
    head, dot, rest = name.partition(".")
    return {head: nest(rest, value) if dot else value}


def _same_keys(below: Mapping[str, Any], over: Mapping[str, Any]) -> bool:
    return "kind" not in over or (below.get("kind") == "full") == (over["kind"] == "full")


def _strict_loader() -> type[yaml.SafeLoader]:
    """A safe loader that refuses a key written twice (PyYAML keeps the last one without a word)."""
    import yaml

    class StrictLoader(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            seen: set[str] = set()
            for key_node, _ in node.value:
                if key_node.value in seen and isinstance(key_node, yaml.ScalarNode):
                    raise yaml.constructor.ConstructorError(
                        None, None, f"key {key_node.value!r} is written twice", key_node.start_mark
                    )
                if isinstance(key_node, yaml.ScalarNode):
                    seen.add(key_node.value)
            return super().construct_mapping(node, deep)

    return StrictLoader


def _yaml_reason(error: yaml.YAMLError) -> str:
    problem = getattr(error, "problem", None) or str(error)
    mark = getattr(error, "problem_mark", None)
    return f"{problem} (line {mark.line + 1})" if mark is not None else str(problem)


def _reason(error: OSError | UnicodeDecodeError) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else "it is not UTF-8 text"


def _type_name(content: object) -> str:
    return "nothing" if content is None else f"a {type(content).__name__}"
