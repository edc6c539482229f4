"""What ``vramplan fields`` says of a spec."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from vramplan.cli.app import main
from vramplan.errors import UnknownNameError
from vramplan.spec.fields import list_fields
from vramplan.spec.load import run_from_mapping
from vramplan.spec.recipes import TASKS, read_recipe

FREE = ("data.eval_sets", "data.train.fields", "data.replay.fields", "model_config_fields")
"""Mappings whose keys the user chooses."""


def test_every_field_is_documented_once():
    found = list_fields()
    assert len({each.key for each in found}) == len(found)
    assert [each.key for each in found if not each.text] == []
    assert not any("``" in each.text or "None:" in each.text for each in found)


def keys_of(fields: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in fields.items():
        yield prefix + name
        if isinstance(value, dict) and prefix + name not in FREE:
            yield from keys_of(value, f"{prefix}{name}.")


@pytest.mark.parametrize("task", TASKS)
def test_every_key_of_a_recipe_and_of_a_full_spec_is_listed(task):
    listed = {each.key for each in list_fields()}
    fields = read_recipe(task).fields
    assert set(keys_of(fields)) <= listed
    assert set(keys_of(run_from_mapping(fields).model_dump())) <= listed


def test_what_a_field_takes_is_told_with_its_bounds_and_default():
    (found,) = list_fields("method.train_last_blocks")
    assert (found.takes, found.default) == ("whole number at least 1, or null", "null")
    assert found.text.startswith("(full) Only the last this many blocks are trained")
    kinds = {each.key: each for each in list_fields("method")}["method.kind"]
    assert (kinds.takes, kinds.default) == ("full, lora, qlora", "full")


def test_a_key_that_is_none_is_answered_with_the_nearest(capsys):
    with pytest.raises(UnknownNameError, match=r"unknown field 'retain\.ecw'; did you mean retain\.ewc"):
        list_fields("retain.ecw")
    with pytest.raises(SystemExit):
        main(["fields", "retain.kl"])
    shown = capsys.readouterr().out
    assert "retain.kl.weight" in shown
    assert "number above 0" in shown


def test_brackets_of_a_help_text_are_printed(capsys):
    """They are no markup: ``vramplan[eval]`` names what to install."""
    with pytest.raises(SystemExit):
        main(["fields"])
    shown = capsys.readouterr().out
    assert "needs vramplan[eval]." in shown
    assert [each.key for each in list_fields() if each.text not in shown or each.default not in shown] == []
