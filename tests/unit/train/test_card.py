"""The model card says what was asked so that it can be asked again."""

from __future__ import annotations

import pytest
import yaml

from vramplan.spec.load import run_from_mapping
from vramplan.train.card import model_card


def evaluation(step: int, perplexity: float) -> dict[str, object]:
    return {"event": "evaluation", "set": "replay", "step": step, "perplexity": perplexity}


def test_the_card_tells_of_the_weights_that_were_exported():
    events = [evaluation(0, 9.0), {"event": "step", "step": 4}, evaluation(2, 7.0), evaluation(4, 8.0)]
    run = run_from_mapping({"model": "b", "training": {"best_on": "held_out"}, "retain": {"interpolate": 0.25}})
    best = model_card(run, [*events, {"event": "best", "step": 2}], "b")
    assert "for 4 optimizer steps. The weights are those after step 2, the best on held_out. 25% of the base" in best
    assert "| held-out set | perplexity before training | these weights' perplexity |" in best
    assert "| replay | 9.000 | 7.000 |" in best
    last = model_card(run_from_mapping({"model": "b"}), events, "b")
    assert "for 4 optimizer steps.\n" in last
    assert "| replay | 9.000 | 8.000 |" in last


def test_a_card_does_not_compare_the_weights_with_themselves():
    """Only some runs are evaluated before training; the first evaluation of others is of trained weights."""
    run = run_from_mapping({"model": "b"})
    card = model_card(run, [evaluation(2, 7.0), {"event": "step", "step": 2}], "b")
    assert "| held-out set | these weights' perplexity |\n| --- | --- |\n| replay | 7.000 |" in card
    assert "before" not in card
    one_set = [evaluation(0, 9.0), evaluation(2, 7.0), {**evaluation(2, 5.0), "set": "held_out"}]
    assert "| replay | 9.000 | 7.000 |\n| held_out | - | 5.000 |" in model_card(run, one_set, "b")


def test_a_single_step_is_one_step():
    card = model_card(run_from_mapping({"model": "b"}), [{"event": "step", "step": 1}], "b")
    assert "for 1 optimizer step.\n" in card


def test_the_card_of_dora_says_so():
    card = model_card(run_from_mapping({"model": "b", "method": "dora"}), [], "b")
    assert "# b, fine-tuned (lora with DoRA)" in card
    assert yaml.safe_load(card.split("---")[1])["tags"] == ["vramplan", "lora", "dora"]


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


def test_the_card_of_merged_adapters_does_not_ask_for_peft():
    run = run_from_mapping({"model": "some/base", "method": "lora"})
    adapters, merged = (model_card(run, [], "some/base", merged=each) for each in (False, True))
    assert "library_name: peft" in adapters
    assert "library_name: transformers" in merged
    assert "# base, fine-tuned (lora, merged)" in merged
