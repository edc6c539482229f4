"""Ranks that share sequences train what ranks with whole ones train, and the ladder makes them share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vramplan.measure.run_dir import RunDir
from vramplan.search.plan import Plan

from support.faulty import attempts_of, fault, samples_of, train_with
from support.ranks import run_workers
from support.small_configs import SMALL, label
from support.tiny_model import save_tiny_model
from support.training import events_of, losses, train, write_spec

pytestmark = pytest.mark.ranks

LORA = {"kind": "lora", "r": 4}
STAGE_3 = {"zero": {"stage": 3}}
CASES: dict[str, dict[str, Any]] = {
    "two moments": {"zero": {"stage": 1}},
    "no partition": {"zero": {"stage": 0}},
    "weights of targets": {"weighted": True},
    "recomputed": {"activation_checkpointing": "full"},
    "tiles": {"tiled_mlp": True},
    "springs": {"retain": {"l2sp": {"weight": 0.3}}},
    "near the base": {"method": LORA, "retain": {"kl": {"weight": 0.5}}},
    "adapters": {**STAGE_3, "method": LORA},
}
FAMILIES = [
    entry
    for entry in SMALL
    if entry[0] not in ("gpt2", "gpt_neox", "opt", "bloom", "falcon", "llama4_text", "gpt_oss")
    and not entry[0].startswith("deepseek")
    and "sliding_window" not in entry[1]
]
"""Those that go with sequence parallelism (``search/legality.py``)."""


def trained(root: Path, model: Path, world_size: int, runs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    root.mkdir()
    given = [f"{name}={json.dumps(fields)}" for name, fields in runs.items()]
    run_workers("sequence_worker", world_size, root, model, *given)
    return {name: json.loads((root / f"{name}.json").read_text()) for name in runs}


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-6)
    assert found["evaluated"] == pytest.approx(expected["evaluated"], rel=2e-6)
    norms = [norm for norm in expected["norms"] if norm is not None]
    assert [norm for norm in found["norms"] if norm is not None] == pytest.approx(norms, rel=2e-5)


def test_halves_of_sequences_give_the_losses_norms_and_evaluation_of_whole_ones(tiny_model, tmp_path):
    """Stage 3 is the odd one: DeepSpeed averages its gradients over all ranks, those of others over groups."""
    runs = {"whole": {}, "halves": {"sp": 2}, "halves of 3": {"sp": 2, **STAGE_3}}
    found = trained(tmp_path / "seen", tiny_model, 2, runs)
    assert_same(found["halves"], found["whole"])
    assert_same(found["halves of 3"], found["whole"])


@pytest.mark.slow
def test_what_a_run_may_ask_besides_goes_with_halves_too(tiny_model, tmp_path):
    runs = {}
    for name, fields in CASES.items():
        runs |= {f"{name} whole": fields, f"{name} halves": {"sp": 2, **fields}}
    found = trained(tmp_path / "seen", tiny_model, 2, runs)
    for name in CASES:
        assert_same(found[f"{name} halves"], found[f"{name} whole"])


@pytest.mark.slow
def test_four_ranks_share_each_sequence_by_twos_and_by_fours(tiny_model, tmp_path):
    runs = {f"{name} {sp}": {"sp": sp, **fields} for sp in (1, 2, 4) for name, fields in (("2", {}), ("3", STAGE_3))}
    found = trained(tmp_path / "seen", tiny_model, 4, dict(sorted(runs.items())))
    for name in runs:
        assert_same(found[name], found["2 1"])


@pytest.mark.slow
def test_every_family_that_is_not_refused_trains_the_same_on_halves(tmp_path):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    runs = {}
    for entry in FAMILIES:
        name = label(entry)
        torch.manual_seed(0)
        config = AutoConfig.for_model(entry[0], **{**entry[1], "vocab_size": 512, "pad_token_id": 0})
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / name)
        fields = {"model": str(tmp_path / name)}
        runs |= {f"{name} whole": fields, f"{name} halves": {"sp": 2, **fields}}
    found = trained(tmp_path / "seen", tmp_path, 2, runs)
    for entry in FAMILIES:
        whole, halves = found[f"{label(entry)} whole"], found[f"{label(entry)} halves"]
        # a window that is dropped makes a difference of 1e-3 and more
        assert halves["losses"] == pytest.approx(whole["losses"], rel=2e-5), label(entry)
        assert halves["evaluated"] == pytest.approx(whole["evaluated"], rel=2e-5), label(entry)


@pytest.mark.slow
def test_where_nothing_else_helps_the_ranks_share_sequences_and_train_the_same(tmp_path):
    """The logits of one sequence are too large: only half of one is left to try."""
    wide = save_tiny_model(tmp_path / "wide", vocab_size=32768)
    fields = {"micro_batch_size": 1, "grad_accum_steps": 4, "activation_checkpointing": "full"}
    spec = write_spec(tmp_path / "spec.yaml", wide, 2, **fields)
    whole, run_dir = tmp_path / "whole", tmp_path / "run"
    assert train(spec, "-o", whole).returncode == 0
    done = train_with([fault(1, r"step5\.micro1\.forward", "data", more=10 * 10**6)], spec, run_dir)
    assert done.returncode == 0, done.stdout + done.stderr
    first, last = attempts_of(run_dir)
    assert (first.phase, last.cause) == ("step5.micro1.forward", "finished")
    assert first.changes["layout.sp"] == 2
    assert "each sequence on 2 ranks" in last.layout
    run = Plan.load(RunDir(run_dir).plan).run
    assert run.layout is not None
    assert (run.layout.dp, run.layout.sp, run.global_batch_size) == (1, 2, 8)
    assert losses(run_dir) == pytest.approx(losses(whole), rel=1e-5)
    assert samples_of(run_dir) == samples_of(whole)
    evaluated = [events_of(each, "evaluation")[-1]["loss"] for each in (run_dir, whole)]
    assert evaluated[0] == pytest.approx(evaluated[1], rel=1e-5)
