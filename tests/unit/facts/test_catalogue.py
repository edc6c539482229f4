"""The catalogue of models."""

from __future__ import annotations

import pytest

from vramplan.errors import UnknownNameError
from vramplan.facts.catalogue import all_models, find_model, list_models
from vramplan.facts.families import FAMILIES, REMOTE_CODE_FAMILIES


def test_every_entry_has_a_source_and_no_count_of_its_own():
    for entry in all_models():
        assert entry.source
        assert "params_total" not in entry.config
        assert entry.model_type in FAMILIES or entry.model_type in REMOTE_CODE_FAMILIES


def test_names_are_unique_without_case():
    names = [entry.name.lower() for entry in all_models()]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("name", ["meta-llama/Llama-3.1-8B", "META-LLAMA/llama-3.1-8b", "llama-3.1-8b"])
def test_a_model_is_found_without_case_or_owner(name):
    assert find_model(name).name == "meta-llama/Llama-3.1-8B"


def test_an_unknown_model_names_the_nearest():
    with pytest.raises(UnknownNameError) as raised:
        find_model("Qwen/Qwen2.5-7B")
    assert raised.value.nearest[0] == "Qwen/Qwen2.5-7B-Instruct"


def test_listing_wants_every_word():
    names = [entry.name for entry in list_models("qwen 72b")]
    assert names == ["Qwen/Qwen2-72B-Instruct", "Qwen/Qwen2.5-72B-Instruct"]
    assert list_models("no such thing") == ()
    assert list_models() == all_models()
