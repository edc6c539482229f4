"""The model card says what was asked so that it can be asked again."""

from __future__ import annotations

import pytest
import yaml

from vramplan.spec.load import run_from_mapping
from vramplan.train.card import model_card


@pytest.mark.parametrize(
    "fields",
    [{}, {"method": {"kind": "lora"}, "retain": {"kl": {}, "ewc": {"data": "general.jsonl"}}}, {"seq_len": 512}],
    ids=str,
)
def test_the_spec_in_a_card_reads_back_as_the_run(fields):
    run = run_from_mapping({"model": "some/base", **fields})
    card = model_card(run, [{"event": "step", "step": 7}], "some/base")
    assert "for 7 optimizer steps" in card
    front, spec = card.split("---")[1], card.split("```")[1].removeprefix("yaml\n")
    assert yaml.safe_load(front)["base_model"] == "some/base"
    assert run_from_mapping(yaml.safe_load(spec)) == run
    assert f"kind: {run.method.kind}" in spec
