"""Recipes: specs with the reason for each choice in comments, one a task (``configs/``), and how one is adapted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vramplan.errors import UnknownNameError

TASKS = {
    "sft-chat": "teach a chat model your conversations, and keep what it could do",
    "sft-base": "make a base model follow instructions",
    "domain-cpt": "continued pre-training on the text of a domain",
    "classify": "answer with a label",
}

ADAPTER_RANKS = {"sft-base": 64, "domain-cpt": 128}
"""Of recipes that train fully: the least rank that their comments give for adapters in its place."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """A task's recipe as it is written to a file."""

    task: str
    text: str

    @property
    def fields(self) -> dict[str, Any]:
        """What it asks for, as a spec."""
        import yaml

        parsed: dict[str, Any] = yaml.safe_load(self.text)
        return parsed

    def with_values(self, values: Mapping[str, Any]) -> Recipe:
        """The recipe with other values at dotted keys, such as ``data.train``; comments stay where they are.

        Each key must be in the recipe, with its value on one line.
        """
        text = self.text
        for key, value in values.items():
            start, end = _span(text, key)
            text = text[:start] + _inline(value) + text[end:]
        return Recipe(self.task, text)


def read_recipe(task: str) -> Recipe:
    """The recipe of a task.

    Raises:
        UnknownNameError: there is none of that name.
    """
    if task not in TASKS:
        raise UnknownNameError("task", task, TASKS, f"(tasks: {', '.join(TASKS)})")
    return Recipe(task, (_directory() / f"{task}.yaml").read_text(encoding="utf-8"))


def _directory() -> Path:
    """``configs`` lies in the package where it was built, and beside it in a working copy."""
    package = Path(__file__).parents[1]
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def _span(text: str, key: str) -> tuple[int, int]:
    """Where the value of a dotted key stands in the text."""
    import yaml

    node: Any = yaml.compose(text, Loader=yaml.SafeLoader)
    for part in key.split("."):
        node = {each.value: value for each, value in node.value}[part]
    assert isinstance(node, yaml.ScalarNode) or node.flow_style
    return node.start_mark.index, node.end_mark.index


def _inline(value: Any) -> str:
    """A value as YAML on one line, read back as it is also inside ``{ }``."""
    import json

    import yaml

    if isinstance(value, str):
        plain = yaml.safe_load(f"[{value}]") if value and not set(value) & set(",[]{}#&*!|>'\"%@`") else None
        return value if plain == [value] else json.dumps(value, ensure_ascii=False)
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key}: {_inline(each)}" for key, each in value.items()) + " }"
    return json.dumps(value)
