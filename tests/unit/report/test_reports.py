"""Reports of one result in terminal, notebook and JSON say the same."""

from __future__ import annotations

import html
import json
from dataclasses import replace
from pathlib import Path

import pytest

from vramplan.api import fit, plan
from vramplan.emit.deepspeed import ds_config
from vramplan.memory.ledger import Estimate, PhaseBytes
from vramplan.memory.term import Basis, Category, Moment, Phase, Place, Term
from vramplan.report import words
from vramplan.report.as_json import fit_to_dict, plan_to_dict
from vramplan.report.console import bar_text, render_estimate
from vramplan.report.display import to_text
from vramplan.report.html import estimate_html
from vramplan.report.plan_dir import refused_markdown, write_plan_dir
from vramplan.report.rows import host_rows, ledger_rows, moment_rows, nearest_refusals
from vramplan.search.plan import Plan
from vramplan.search.remedy import Remedy

GIB = 2**30
ASKED = {
    "model": "meta-llama/Llama-3.1-8B",
    "seq_len": 4096,
    "global_batch_size": 64,
    "hardware": {"gpu": "h100-80gb", "gpus_per_node": 8, "host_memory": "2TiB"},
}


def term(name: str, num_bytes: int, basis: Basis = Basis.EXACT, place: Place = Place.DEVICE) -> Term:
    return Term(name, num_bytes, Category.PARAMETER, basis, f"why {name}", place)


@pytest.fixture
def small() -> Estimate:
    """Weights and gradients at the peak, a context that is assumed, states on the host."""
    peak = Moment("gradient reduction", Phase.BACKWARD, (term("weights", 6 * GIB), term("<grads>", 2 * GIB)))
    before = Moment("load", Phase.MODEL_LOAD, (term("weights", 6 * GIB),))
    return Estimate(
        moments=(before, peak),
        phases=(PhaseBytes("model_load", 6 * GIB, 6 * GIB), PhaseBytes("step1.micro1.backward", 8 * GIB, 6 * GIB)),
        overhead=(term("context", GIB, Basis.ASSUMED), term("crumb", 1000, Basis.FITTED), term("dust", 1000)),
        host_terms=(term("states", 3 * GIB, place=Place.HOST),),
        capacity_bytes=10 * GIB,
        ranks_per_node=4,
        host_capacity_bytes=None,
    )


def test_the_ledger_adds_up(small: Estimate):
    rows = ledger_rows(small)
    totals = [row for row in rows if row.is_total]
    terms = [row for row in rows if not row.is_total]
    assert [row.num_bytes for row in totals] == [small.allocated_peak_bytes, small.used_peak_bytes]
    assert sum(row.num_bytes for row in terms) == small.used_peak_bytes
    assert sum(row.share for row in terms) == pytest.approx(1)
    assert [row.name for row in terms] == ["weights", "<grads>", "context", "2 smaller terms"]
    assert "crumb" in terms[-1].note


def test_moments_come_in_order_and_the_peak_stands_out(small: Estimate):
    rows = moment_rows(small)
    assert [(row.name, row.is_total) for row in rows] == [("load", False), ("gradient reduction", True)]
    assert [row.share for row in rows] == [0.75, 1.0]


def test_host_rows_are_there_only_where_something_is_hosted(small: Estimate):
    assert [row.name for row in host_rows(small)] == ["states", "host memory of one rank"]
    assert host_rows(replace(small, host_terms=())) == []


@pytest.mark.parametrize("render", [lambda e: to_text(render_estimate(e)), estimate_html], ids=["terminal", "html"])
def test_each_form_shows_terms_bytes_totals_moments_and_what_is_assumed(small: Estimate, render):
    shown = html.unescape(render(small))
    for text in ("weights", "6.0 GiB", "66.7%", "<grads>", "allocated by tensors", "9.0 GiB", "used, as the driver"):
        assert text in shown
    for text in ("gradient reduction", "load", "states", "ASSUMED context: why context", "FITTED crumb"):
        assert text in shown


def test_html_escapes_what_it_shows(small: Estimate):
    assert "<grads>" not in estimate_html(small)
    assert "&lt;grads&gt;" in estimate_html(small)


@pytest.mark.parametrize(
    ("share", "expected"), [(0, ""), (1e-9, "▏"), (0.5, "████"), (1, "████████"), (1.3, "████████"), (1 / 16, "▌")]
)
def test_bars(share: float, expected: str):
    assert bar_text(share, width=8) == expected


def test_the_verdict_of_a_run_that_fits_says_where_it_peaks_and_what_is_left():
    found = fit(ASKED)
    text = words.verdict(found)
    assert text.startswith("FITS: meta-llama/Llama-3.1-8B (8.03 B parameters), full fine-tuning in bf16")
    assert found.estimate.peak.name in text
    assert "8 x NVIDIA H100" in text
    assert "of the 79.2 GiB" in text
    assert "to spare" in text


def test_the_verdict_of_a_run_that_does_not_fit_says_how_far_off_it_is_and_what_would_do():
    found = fit(ASKED, zero={"stage": 0})
    text = words.verdict(found)
    assert text.startswith("DOES NOT FIT: ")
    assert "too many; it would fit with --zero " in text
    assert text.count("\n") == 0


def test_host_memory_that_nobody_knows_is_a_condition_of_the_verdict():
    found = fit(ASKED)
    pinned = Term("optimizer states", 64 * GIB, Category.OPTIMIZER, Basis.EXACT, "", Place.HOST)
    on_host = replace(found.estimate, host_terms=(pinned,), host_capacity_bytes=None)
    assert "if each host has" in words.verdict(replace(found, estimate=on_host))
    assert "if each host has" not in words.verdict(fit(ASKED))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ((("zero.stage", 3),), "--zero 3 (1.0 GiB)"),
        ((("micro_batch_size", 1), ("zero.stage", 1)), "--micro-batch 1 --zero 1 (1.0 GiB)"),
        ((("zero.offload_optimizer", "cpu"),), "--offload optimizer (1.0 GiB)"),
        ((("zero.offload_optimizer", "cpu"), ("zero.offload_param", "cpu")), "--offload all (1.0 GiB)"),
        ((("layout.dp", 2), ("layout.sp", 4)), "--set layout.dp=2 --set layout.sp=4 (1.0 GiB)"),
        ((("zero.reduce_scatter", False),), "--set zero.reduce_scatter=false (1.0 GiB)"),
        ((("hardware.gpu", "NVIDIA H200 (SXM)"),), "--gpu 'NVIDIA H200 (SXM)' (1.0 GiB)"),
    ],
    ids=str,
)
def test_remedies_are_told_as_options(changes, expected):
    assert words.remedy_text(Remedy(changes, GIB)) == expected
    assert "changes the training" in words.remedy_text(Remedy(changes, GIB, changes_training=True))


def test_json_has_the_promised_keys_and_its_terms_add_up():
    answer = json.loads(json.dumps(fit_to_dict(fit(ASKED))))
    promised = {
        "fits",
        "peak_phase",
        "allocated_peak_bytes_per_rank",
        "used_peak_bytes_per_rank",
        "capacity_bytes",
        "host_bytes_per_node",
        "plan",
        "terms",
    }
    assert promised <= set(answer)
    assert answer["fits"] is True
    assert sum(each["bytes"] for each in answer["terms"]) == answer["used_peak_bytes_per_rank"]
    assert answer["peak_phase"] in {phase.value for phase in Phase}
    assert answer["plan"]["micro_batch_size"] * answer["plan"]["grad_accum_steps"] * 8 == 64
    assert max(each["allocated_bytes"] for each in answer["moments"]) == answer["allocated_peak_bytes_per_rank"]


def test_json_of_a_run_that_does_not_fit_tells_the_remedies():
    answer = json.loads(json.dumps(fit_to_dict(fit(ASKED, zero={"stage": 0}))))
    assert answer["fits"] is False
    assert answer["used_peak_bytes_per_rank"] > answer["capacity_bytes"]
    assert answer["remedies"][0]["changes"]["zero.stage"] > 0


def test_a_plans_directory_holds_what_train_needs(tmp_path: Path):
    made = plan(ASKED)
    files = write_plan_dir(made, tmp_path / "new" / "dir")
    assert [path.name for path in files] == ["plan.yaml", "ds_config.json", "launch.sh", "refused.md"]
    assert Plan.load(files[0]).run == made.run
    assert json.loads(files[1].read_text()) == ds_config(made.run, 8)
    script = files[2].read_text()
    assert script.startswith("#!/bin/sh\n")
    assert '"$PLAN" "$RUN_DIR"' in script
    assert files[2].stat().st_mode & 0o100
    for refusal in made.refused:
        assert f"| {refusal.candidate.label()} |" in files[3].read_text()
        assert refusal.reason in files[3].read_text()


def test_a_plan_without_refusals_says_so():
    made = replace(plan(ASKED), refused=())
    assert "No candidate looked better." in refused_markdown(made)
    assert "No better-looking candidate was refused." in str(made)


def test_versions_are_recorded():
    assert {"vramplan", "python"} <= set(plan(ASKED).versions)
    assert plan_to_dict(plan(ASKED))["plan_file"]["versions"]["vramplan"]


def test_of_refusals_that_differ_in_micro_batch_only_the_smallest_is_shown():
    refused = plan(ASKED).refused
    assert refused
    shown = nearest_refusals(refused)
    layouts = [replace(each.candidate, micro_batch_size=0, grad_accum_steps=0) for each in shown]
    assert len(layouts) == len(set(layouts))
    for refusal in refused:
        layout = replace(refusal.candidate, micro_batch_size=0, grad_accum_steps=0)
        nearest = shown[layouts.index(layout)].candidate
        assert nearest.micro_batch_size <= refusal.candidate.micro_batch_size
