"""One row a method: a file with formula and paper, fields that are understood, terms that the ledger shows."""

from __future__ import annotations

import importlib
from dataclasses import replace

import pytest
import torch

import vramplan
from vramplan.errors import SpecError
from vramplan.facts.device import Device, Node
from vramplan.facts.resolve import resolve_architecture
from vramplan.memory import labels
from vramplan.memory.estimate import estimate
from vramplan.rank.retention import anchored_penalties
from vramplan.retain.base_model import BaseModel
from vramplan.retain.registry import METHODS
from vramplan.spec.load import merge, run_from_mapping
from vramplan.train.model import load_model
from vramplan.train.retention import reference_model

from support.tiny_model import save_tiny_model

RETENTION = {term for method in METHODS for term in method.terms}
BASE = {
    "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "seq_len": 64,
    "micro_batch_size": 1,
    "grad_accum_steps": 1,
    "activation_checkpointing": "none",
    "zero": {"stage": 2},
}
NODE = Node(Device("CPU", "cpu", 2**36, 2**36), gpus_per_node=2)


def shown(fields) -> set[str]:
    run = run_from_mapping(merge(BASE, fields))
    found = estimate(run, NODE, resolve_architecture(run))
    return {term.name for moment in found.moments for term in moment.terms}


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.module)
def test_every_method_has_its_paper_and_its_terms(method):
    module = importlib.import_module(f"vramplan.retain.{method.module}")
    assert "arXiv" in module.__doc__ or "Prechelt" in module.__doc__
    assert shown(method.fields) & RETENTION == set(method.terms)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("method", [each for each in METHODS if each.terms], ids=lambda method: method.module)
def test_what_a_method_keeps_is_what_the_ledger_says(method, kind, ranks, tmp_path):
    """``state_bytes()`` of the real hooks on a real model, to the byte."""
    directory = save_tiny_model(tmp_path, hidden_size=40, intermediate_size=63)
    asked = merge(BASE, {"model": str(directory), "precision": "fp32", "method": {"kind": kind}})
    run = run_from_mapping(merge(asked, method.fields))
    found = estimate(run, replace(NODE, gpus_per_node=ranks), resolve_architecture(run))
    terms = {term.name: term.num_bytes for moment in found.moments for term in moment.terms}
    kept = sum(terms.get(name, 0) for name in (labels.ANCHORS, labels.FISHER, labels.REFERENCE))
    module = load_model(run, directory, {}).module
    springs = anchored_penalties(run, module, 0, ranks)
    if springs is None:
        reference = reference_model(run, directory, {}, torch.device("cpu"))
        assert BaseModel(None, reference).state_bytes() == kept
        return
    springs.anchor()
    if run.retain.ewc is not None:
        springs.begin_sample(1.0, counts=True)
    assert springs.state_bytes() == kept > 0


def test_a_frozen_copy_computes_in_the_runs_own_precision(tmp_path):
    """Else its logits would be twice as large as the ledger says."""
    directory = save_tiny_model(tmp_path)
    fields = {"model": str(directory), "precision": "bf16-autocast", "retain": {"kl": {"weight": 0.5}}}
    run = run_from_mapping(merge(BASE, fields))
    reference = reference_model(run, directory, {}, torch.device("cpu"))
    inputs = {"input_ids": torch.arange(8)[None]}
    assert BaseModel(None, reference, autocast=True).logits(inputs).dtype is torch.bfloat16
    assert BaseModel(None, reference).logits(inputs).dtype is torch.float32


def test_methods_combine():
    together = {}
    for method in METHODS:
        if method.adapters:
            together = merge(together, method.fields)
    assert shown(together) >= RETENTION
    adapters = shown(merge(together, {"method": {"kind": "lora"}}))
    assert RETENTION - adapters == {"frozen copy of the base"}  # adapters are switched off instead


def test_without_any_the_ledger_has_none_of_their_terms():
    assert not shown({}) & RETENTION


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ({"freeze": [".*"]}, r"method\.freeze \['\.\*'\] leaves nothing to train"),
        ({"freeze": ["layer_norm"]}, r"is found in no parameter's name, such as model\.embed_tokens\.weight or"),
        ({"train_last_blocks": 99}, r"method\.train_last_blocks 99 is more than the 30 blocks"),
        ({"new_blocks": 2, "freeze": [".*"]}, r"leaves nothing to train"),
    ],
    ids=str,
)
def test_a_method_that_trains_nothing_is_one_sentence(method, said):
    asked = {**BASE, "method": {"kind": "full", **method}}
    with pytest.raises(SpecError, match=said):
        vramplan.estimate(asked, NODE)
    with pytest.raises(SpecError, match=said):
        vramplan.fit({**asked, "hardware": {"gpu": "cpu", "gpus_per_node": 1}, "micro_batch_size": None})


def test_freezing_shrinks_what_is_trained():
    full, last = (
        vramplan.estimate(BASE, NODE),
        vramplan.estimate({**BASE, "method": {"kind": "full", "train_last_blocks": 2}}, NODE),
    )
    assert last.allocated_peak_bytes < full.allocated_peak_bytes
