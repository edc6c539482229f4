"""The choice, why others were refused, and what would make a run fit: held to each other, whatever the bytes are."""

from __future__ import annotations

import resource
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from vramplan.errors import LegalityError, NoPlanError, SpecError
from vramplan.facts.device import Node
from vramplan.facts.devices import cpu_node, find_device
from vramplan.facts.host import Host
from vramplan.facts.resolve import resolve_architecture
from vramplan.memory.estimate import UncoveredError, estimate_run
from vramplan.report.words import verdict
from vramplan.search.choose import search
from vramplan.search.fit import fit_run
from vramplan.search.lean import leanest_fit
from vramplan.search.plan import Plan, asked_fields, is_plan
from vramplan.search.planner import make_plan
from vramplan.search.price import TIE_FRAC, priced
from vramplan.search.remedy import applied
from vramplan.search.room import fits_with_margin
from vramplan.spec.load import merge, run_from_mapping
from vramplan.spec.run import RunSpec

GIB = 2**30
H100 = Node(find_device("h100-80gb"), 8, host_memory_bytes=2048 * GIB)
LAPTOP = cpu_node(Host(16 * GIB, 16 * GIB, None, None, None, 2))
LLAMA = {"model": "meta-llama/Llama-3.1-8B", "seq_len": 4096, "global_batch_size": 64}
SMOL = {"model": "HuggingFaceTB/SmolLM2-135M-Instruct", "seq_len": 512, "global_batch_size": 8, "method": "lora"}


def ask(base: dict[str, object], **fields: object) -> RunSpec:
    return run_from_mapping(merge(base, fields))


def capped(node: Node, cap_gib: float) -> Node:
    return replace(node, memory_cap_bytes=int(cap_gib * GIB))


CASES = {
    "8B full": (ask(LLAMA), H100),
    "8B LoRA in 24 GiB": (ask(LLAMA, method="lora"), capped(H100, 24)),
    "135M LoRA on a CPU": (ask(SMOL), LAPTOP),
    "135M full in 4 GiB": (ask(SMOL, method="full"), capped(LAPTOP, 4)),
}


def fits(run: RunSpec, node: Node, margin_frac: float) -> bool:
    try:
        return fits_with_margin(estimate_run(run, node, resolve_architecture(run)), margin_frac)
    except UncoveredError:
        return False


@pytest.mark.parametrize(("run", "node"), CASES.values(), ids=CASES)
def test_the_plan_is_the_best_candidate_that_fits(run: RunSpec, node: Node):
    architecture = resolve_architecture(run)
    plan = make_plan(run, node, architecture)
    every = priced(run, node, architecture)
    (chosen,) = [each for each in every if each.run == plan.run]
    fitting = [each for each in every if fits(each.run, node, plan.margin_frac)]
    assert chosen in fitting
    fastest = min(each.seconds_per_sequence for each in fitting)
    assert chosen.seconds_per_sequence <= fastest * (1 + TIE_FRAC)
    as_fast = [each for each in fitting if each.seconds_per_sequence <= fastest * (1 + TIE_FRAC)]
    assert chosen.complexity == min(each.complexity for each in as_fast)


@pytest.mark.parametrize(("run", "node"), CASES.values(), ids=CASES)
def test_every_better_looking_candidate_is_refused_with_its_reason(run: RunSpec, node: Node):
    architecture = resolve_architecture(run)
    plan = make_plan(run, node, architecture)
    every = priced(run, node, architecture)
    (chosen,) = [each for each in every if each.run == plan.run]
    better = [each for each in every if each.looks_better_than(chosen) and not fits(each.run, node, plan.margin_frac)]
    assert {refusal.candidate for refusal in plan.refused} == {each.candidate for each in better}
    assert len(plan.refused) == len(better)
    for refusal in plan.refused:
        assert refusal.reason
        used = refusal.used_peak_bytes
        assert used is None or used > node.capacity_bytes * (1 - plan.margin_frac) or "host" in refusal.reason


def test_the_plans_prediction_is_the_estimate_of_its_run():
    run = ask(LLAMA)
    architecture = resolve_architecture(run)
    plan = make_plan(run, H100, architecture)
    found = estimate_run(plan.run, H100, architecture)
    assert plan.prediction.used_peak_bytes == found.used_peak_bytes
    assert plan.prediction.phases == found.phases
    assert sum(term.num_bytes for term in plan.prediction.terms) == found.used_peak_bytes
    assert plan.prediction.tokens_per_s == pytest.approx(64 * 4096 / plan.prediction.step_time_s)


def test_more_memory_never_gives_a_slower_plan():
    run = ask(LLAMA, method="lora", zero={"offload_optimizer": "none"})
    architecture = resolve_architecture(run)
    speeds = [
        make_plan(run, capped(H100, cap), architecture).prediction.step_time_s for cap in (20, 24, 32, 40, 48, 64, 79)
    ]
    # each may be a tie with something simpler that is a little slower
    assert all(less <= more * (1 + TIE_FRAC) for more, less in pairwise(speeds)), speeds


def test_a_margin_is_kept_where_it_can_be_and_given_up_where_it_cannot():
    run = ask(SMOL, micro_batch_size=1, zero={"stage": 2}, activation_checkpointing="full")
    architecture = resolve_architecture(run)
    needed = search(run, LAPTOP, architecture).estimate.used_peak_bytes
    exact = replace(LAPTOP, memory_cap_bytes=needed)
    assert make_plan(run, exact, architecture).margin_frac == 0
    assert fit_run(run, exact, architecture).tight
    roomy = replace(LAPTOP, memory_cap_bytes=needed * 2)
    assert make_plan(run, roomy, architecture).margin_frac > 0
    with pytest.raises(NoPlanError):
        make_plan(run, replace(LAPTOP, memory_cap_bytes=needed - 1), architecture)


@pytest.mark.parametrize(
    ("fields", "node"),
    [
        (ask(LLAMA, zero={"stage": 0}), H100),
        (ask(LLAMA, micro_batch_size=8, activation_checkpointing="none", zero={"stage": 2}), H100),
        (ask(LLAMA), capped(H100, 6)),
        (ask(LLAMA, zero={"offload_optimizer": "none"}), Node(find_device("h100-80gb"), 1)),
        (ask(LLAMA, seq_len=131072, global_batch_size=8), H100),
        (ask(LLAMA, zero={"offload_optimizer": "cpu"}), replace(H100, host_memory_bytes=16 * GIB)),
        (ask(SMOL, method="full"), capped(LAPTOP, 0.3)),
        (ask(LLAMA, optimizer="muon"), Node(find_device("a100-40gb"), 4, host_memory_bytes=64 * GIB)),
    ],
    ids=["ZeRO 0", "large micro-batch", "small cap", "one GPU", "long sequences", "small host", "tiny cap", "Muon"],
)
def test_every_remedy_does_make_it_fit(fields: RunSpec, node: Node):
    architecture = resolve_architecture(fields)
    fit = fit_run(fields, node, architecture)
    assert not fit.fits
    assert fit.remedies
    for way in fit.remedies:
        run, cured = applied(fields, node, way.changes)  # these and nothing else
        found = leanest_fit(run, cured, architecture)
        assert found is not None, way
        assert way.used_peak_bytes <= cured.capacity_bytes


def named_changes(run: RunSpec, node: Node) -> list[set[str]]:
    return [{name for name, _ in way.changes} for way in fit_run(run, node, resolve_architecture(run)).remedies]


def test_ranks_that_share_each_sequence_are_offered_for_long_ones():
    run = ask(LLAMA, seq_len=131072, global_batch_size=8)
    assert {"layout.dp", "layout.sp"} in named_changes(run, H100)
    assert {"layout.dp", "layout.sp"} not in named_changes(ask(LLAMA, seq_len=131072, layout={"dp": 8}), H100)


def test_muon_is_offered_the_key_that_zero_3_asks_of_it():
    node = Node(find_device("a100-40gb"), 4, host_memory_bytes=64 * GIB)
    assert {"zero.reduce_scatter"} in named_changes(ask(LLAMA, optimizer="muon"), node)


def test_large_evaluation_batches_are_offered_to_be_small():
    run = ask(SMOL, seq_len=2048, data={"train": "x", "eval_frac": 0.1}, training={"eval_micro_batch_size": 32})
    assert {"training.eval_micro_batch_size"} in named_changes(run, capped(LAPTOP, 4))


def test_what_was_not_tried_because_it_is_not_counted_is_said():
    run, node = ask(LLAMA, optimizer="lion", global_batch_size=None), Node(find_device("rtx4090"), 4)
    fit = fit_run(run, node, resolve_architecture(run))
    assert not fit.fits
    assert fit.uncovered == ("the estimator does not count offload with the optimizer lion yet",)
    assert "(not tried: the estimator does not count offload with the optimizer lion yet)" in verdict(fit)
    with pytest.raises(NoPlanError, match="not tried: the estimator does not count offload"):
        make_plan(run, node, resolve_architecture(run))


def test_bytes_beside_a_remedy_are_those_of_the_plan_that_it_makes():
    run = ask(LLAMA, seq_len=131072, global_batch_size=8)
    architecture = resolve_architecture(run)
    for way in fit_run(run, H100, architecture).remedies:
        changed, cured = applied(run, H100, way.changes)
        assert fit_run(changed, cured, architecture).estimate.used_peak_bytes == way.used_peak_bytes


def test_a_longer_sequence_than_the_remedys_does_not_fit():
    run = ask(LLAMA, seq_len=131072, global_batch_size=8)
    architecture = resolve_architecture(run)
    (length,) = [
        way.changes[0][1] for way in fit_run(run, H100, architecture).remedies if way.changes[0][0] == "seq_len"
    ]
    assert leanest_fit(ask(LLAMA, seq_len=length + 64, global_batch_size=8), H100, architecture) is None


def test_one_gpu_fewer_than_the_remedys_does_not_fit():
    run = ask(LLAMA, global_batch_size=840)
    node = Node(find_device("h100-80gb"), 1, host_memory_bytes=120 * GIB)  # enough to resume, too little to offload to
    architecture = resolve_architecture(run)
    (count,) = [
        dict(way.changes)["hardware.gpus_per_node"]
        for way in fit_run(run, node, architecture).remedies
        if way.changes[0][0] == "hardware.gpus_per_node"
    ]
    assert count > 1
    assert leanest_fit(run, replace(node, gpus_per_node=count), architecture) is not None
    assert leanest_fit(run, replace(node, gpus_per_node=count - 1), architecture) is None


@pytest.mark.parametrize(
    ("run", "node", "said"),
    [
        (ask(LLAMA, seq_len=200_000), H100, "set seq_len to 131072 or less"),
        (ask(LLAMA, global_batch_size=12), H100, "set global_batch_size to 8 or 16"),
        (ask(SMOL), capped(LAPTOP, 0.05), "hardware.memory_cap"),
        (ask(SMOL, zero={"stage": 0}), capped(LAPTOP, 0.05), "hardware.memory_cap"),
    ],
    ids=["too long", "batch", "cap below the weights", "cap below the weights, stage fixed"],
)
def test_a_request_that_cannot_be_met_names_the_number_to_change(run: RunSpec, node: Node, said: str):
    with pytest.raises(NoPlanError) as caught:
        make_plan(run, node, resolve_architecture(run))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_combination_that_deepspeed_refuses_is_named_with_its_source():
    run = ask(LLAMA, zero={"stage": 2, "offload_param": "cpu"})
    with pytest.raises(LegalityError, match=r"offload_param needs ZeRO stage 3.*offload_config\.py"):
        make_plan(run, H100, resolve_architecture(run))


def test_a_plan_survives_its_file(tmp_path: Path):
    run = ask(LLAMA)
    plan = replace(make_plan(run, H100, resolve_architecture(run)), versions={"vramplan": "0"})
    path = tmp_path / "plan.yaml"
    plan.save(path)
    loaded = Plan.load(path)
    device = replace(plan.node.device, source="", note="")
    assert loaded == replace(plan, node=replace(plan.node, device=device))


def test_a_plan_file_stands_for_its_decided_spec(tmp_path: Path):
    run = ask(SMOL)
    plan = make_plan(run, LAPTOP, resolve_architecture(run))
    path = tmp_path / "plan.yaml"
    plan.save(path)
    fields, source = asked_fields(path)
    assert source == str(path)
    assert run_from_mapping(fields) == plan.run
    assert asked_fields("some/model") == ({"model": "some/model"}, "")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model: x\n", "no plan of this version"),
        ("vramplan_plan: 99\n", "no plan of this version"),
        ("vramplan_plan: 1\nrun: {model: x}\n", "damaged plan"),
        ("vramplan_plan: 1\nrun: {model: x, seq_len: 0}\n", "seq_len is 0"),
    ],
)
def test_a_file_that_is_no_plan_is_named(tmp_path: Path, text: str, said: str):
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    with pytest.raises(SpecError) as caught:
        Plan.load(path)
    assert said in str(caught.value)
    assert str(path) in str(caught.value)


def test_plans_are_told_from_specs():
    assert is_plan({"vramplan_plan": 1})
    assert not is_plan({"model": "x"})


def test_a_plan_that_cannot_be_written_leaves_the_earlier_one_whole(tmp_path):
    """As on a full disk: a run whose plan is half written could not be resumed."""
    plan = make_plan(ask(SMOL), LAPTOP, resolve_architecture(ask(SMOL)))
    plan.save(tmp_path / "plan.yaml")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(OSError, match="too large"):
            plan.save(tmp_path / "plan.yaml")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert Plan.load(tmp_path / "plan.yaml").run == plan.run
    assert [path.name for path in tmp_path.iterdir()] == ["plan.yaml"]
