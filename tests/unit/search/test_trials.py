"""What a search passes over by a bound changes nothing of its answer."""

from __future__ import annotations

import pickle

import pytest

from vramplan.facts.device import Node
from vramplan.facts.devices import find_device
from vramplan.facts.resolve import resolve_architecture
from vramplan.search.choose import search
from vramplan.search.trials import Trials
from vramplan.spec.load import run_from_mapping

GIB = 2**30
SMOL = {"model": "HuggingFaceTB/SmolLM2-135M-Instruct", "seq_len": 1024}


@pytest.mark.parametrize(("method", "cap_gib"), [("full", 6), ("lora", 2), ("full", 0.5)])
def test_the_answer_is_that_of_a_search_that_estimates_every_candidate(
    method: str, cap_gib: float, monkeypatch: pytest.MonkeyPatch
):
    run = run_from_mapping({**SMOL, "method": method, "zero": {"offload_optimizer": "none", "offload_param": "none"}})
    node = Node(find_device("rtx3090"), 2, host_memory_bytes=64 * GIB, memory_cap_bytes=int(cap_gib * GIB))
    architecture = resolve_architecture(run)
    found = search(run, node, architecture)
    monkeypatch.setattr(Trials, "_floor", lambda self, each: 0)
    every = search(run, node, architecture)
    assert found == every
    assert list(found.refused) == list(every.refused)
    assert pickle.loads(pickle.dumps(found.refused)) == tuple(found.refused)
