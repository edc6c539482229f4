"""fit, plan and compare as a user calls them: exit codes, sentences, files, JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vramplan.cli.app import main
from vramplan.search.plan import Plan

H100S = ("--gpu", "h100-80gb", "--gpus", "8", "--host-memory", "2TiB")
LLAMA = ("meta-llama/Llama-3.1-8B", "--seq-len", "4096", "--global-batch", "64")


class Shell:
    """Calls the command line in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys
        self.out = self.err = ""

    def __call__(self, *arguments: str) -> int:
        with pytest.raises(SystemExit) as end:
            main(arguments)
        self.out, self.err = self.capsys.readouterr()
        return int(end.value.code or 0)

    def json(self, *arguments: str) -> Any:
        self.code = self(*arguments, "--json")
        return json.loads(self.out)


@pytest.fixture
def vramplan(capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(capsys)


def test_a_run_that_fits_exits_0_with_the_verdict_first(vramplan: Shell):
    assert vramplan("fit", *LLAMA, *H100S) == 0
    lines = vramplan.out.splitlines()
    assert lines[0].startswith("FITS: meta-llama/Llama-3.1-8B")
    assert lines[1].startswith("plan: micro-batch ")
    assert "used, as the driver counts" in vramplan.out or "allocated by tensors" in vramplan.out


def test_a_run_that_does_not_fit_exits_1_and_says_what_would(vramplan: Shell):
    assert vramplan("fit", *LLAMA, *H100S, "--zero", "0") == 1
    assert vramplan.out.startswith("DOES NOT FIT: ")
    assert "it would fit with --zero " in vramplan.out.splitlines()[0]


def test_the_advice_does_fit_when_taken(vramplan: Shell):
    vramplan("fit", *LLAMA, *H100S, "--zero", "0")
    advice = vramplan.out.split("it would fit with --zero ")[1].split(" ")[0]
    assert vramplan("fit", *LLAMA, *H100S, "--zero", advice) == 0


def test_json_has_the_promised_keys(vramplan: Shell):
    answer = vramplan.json("fit", *LLAMA, *H100S)
    assert vramplan.code == 0
    promised = "fits peak_phase allocated_peak_bytes_per_rank used_peak_bytes_per_rank capacity_bytes"
    assert set(promised.split()) | {"host_bytes_per_node", "plan", "terms"} <= set(answer)
    assert vramplan.json("fit", *LLAMA, *H100S, "--zero", "0")["fits"] is False
    assert vramplan.code == 1


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--method", "lora", "--lora-r", "8"), {"method": {"kind": "lora", "r": 8}}),
        (("--lora-r", "4"), {"method": {"kind": "lora", "r": 4}}),
        (("--precision", "bf16-autocast"), {"precision": "bf16-autocast"}),
        (("--micro-batch", "2"), {"micro_batch_size": 2, "grad_accum_steps": 4}),
        (("--zero", "1"), {"zero": {"stage": 1}}),
        (("--checkpointing", "full"), {"activation_checkpointing": "full"}),
        (("--optimizer", "sgd"), {"optimizer": {"kind": "sgd"}}),
        (("--attention", "eager", "--checkpointing", "full"), {"attention": "eager"}),
        (("--offload", "none"), {"zero": {"offload_optimizer": "none", "offload_param": "none"}}),
        (("--set", "zero.reduce_bucket_size=1000000"), {"zero": {"reduce_bucket_size": 1_000_000}}),
        (("--nodes", "2"), {"hardware": {"nodes": 2}, "layout": {"dp": 16}}),
    ],
    ids=str,
)
def test_options_reach_the_plan(vramplan: Shell, options: tuple[str, ...], expected: dict[str, Any]):
    run = vramplan.json("fit", *LLAMA, *H100S, *options)["plan"]["run"]
    for key, value in expected.items():
        shown = {name: run[key][name] for name in value} if isinstance(value, dict) else run[key]
        assert shown == value


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--seq-len", "200000"), "set seq_len to 131072 or less"),
        (("--global-batch", "12"), "set global_batch_size to 8 or 16"),
        (("--precision", "bf17"), "did you mean bf16?"),
        (("--zero", "7"), "zero.stage is 7 but must be 0, 1, 2 or 3"),
        (("--offload", "disk"), "--offload is 'disk' but must be none, optimizer or all"),
        (("--zero", "2", "--offload", "all"), "offload_param needs ZeRO stage 3"),
        (("--set", "hardware.gpu=rtx4090"), "--gpu h100-80gb and --set hardware.gpu=rtx4090 say different"),
        (("--offload", "none", "--set", "zero={offload_param: cpu}"), "--set zero.offload_param=cpu say different"),
        (("--method", "lora", "--set", "method=full"), "--method lora and --set method.kind=full say different"),
        (("--set", "zero.stag=3"), "unknown key 'stag' in zero; did you mean stage"),
        (("--memory-cap", "lots"), "lots"),
        (("--gpu", "h1oo"), "H100"),
    ],
    ids=str,
)
def test_bad_input_exits_2_with_one_sentence(vramplan: Shell, options: tuple[str, ...], said: str):
    assert vramplan("fit", *LLAMA, *H100S, *options) == 2
    assert said in vramplan.err
    assert len(vramplan.err.strip().splitlines()) == 1
    assert vramplan.out == ""


def test_an_option_and_a_field_that_say_the_same_agree(vramplan: Shell):
    assert vramplan("fit", *LLAMA, *H100S, "--zero", "2", "--set", "zero.stage=2") == 0


def test_a_spec_file_may_stand_for_the_model_and_options_lie_over_it(vramplan: Shell, tmp_path: Path):
    spec = tmp_path / "recipe.yaml"
    spec.write_text("model: meta-llama/Llama-3.1-8B\nmethod: lora\nseq_len: 1024\nglobal_batch_size: 16\n")
    run = vramplan.json("fit", str(spec), *H100S, "--seq-len", "2048")["plan"]["run"]
    assert (run["method"]["kind"], run["seq_len"], run["global_batch_size"]) == ("lora", 2048, 16)
    spec.write_text("model: meta-llama/Llama-3.1-8B\nmetod: lora\n")
    assert vramplan("fit", str(spec)) == 2
    assert f"{spec}: unknown key 'metod'; did you mean method" in vramplan.err


def test_plan_writes_what_train_needs_and_prints_it(vramplan: Shell, tmp_path: Path):
    assert vramplan("plan", *LLAMA, *H100S, "-o", str(tmp_path / "out")) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "plan.yaml",
        "ds_config.json",
        "launch.sh",
        "refused.md",
    }
    plan = Plan.load(tmp_path / "out" / "plan.yaml")
    assert plan.run.global_batch_size == 64
    assert plan.versions["vramplan"]
    assert "Predicted, bytes allocated on one rank" in vramplan.out
    assert f"vramplan train {tmp_path / 'out' / 'plan.yaml'}" in vramplan.out


def test_a_plan_is_a_spec_of_itself(vramplan: Shell, tmp_path: Path):
    first = vramplan.json("plan", *LLAMA, *H100S, "-o", str(tmp_path))
    again = vramplan.json("plan", str(tmp_path / "plan.yaml"), *H100S, "-o", str(tmp_path / "again"))
    assert again["plan"]["run"] == first["plan"]["run"]
    assert again["plan_file"]["refused"] == []


def test_plan_for_this_machine_is_two_cpu_ranks_under_a_cap(vramplan: Shell, tmp_path: Path):
    model = ("HuggingFaceTB/SmolLM2-135M-Instruct", "--method", "lora", "--global-batch", "8", "--seq-len", "256")
    answer = vramplan.json("plan", *model, "--gpu", "cpu", "--memory-cap", "3GiB", "-o", str(tmp_path))
    assert answer["plan"]["world_size"] == 2
    assert answer["plan_file"]["prediction"]["used_peak_bytes"] <= 3 * 2**30
    assert json.loads((tmp_path / "ds_config.json").read_text())["gradient_accumulation_steps"] >= 1


def test_plan_names_the_number_to_change_where_nothing_fits(vramplan: Shell, tmp_path: Path):
    model = ("HuggingFaceTB/SmolLM2-135M-Instruct", "--global-batch", "8", "--gpu", "cpu")
    assert vramplan("plan", *model, "--memory-cap", "50MiB", "-o", str(tmp_path / "out")) == 2
    assert "hardware.memory_cap" in vramplan.err
    assert not (tmp_path / "out").exists()


def test_plan_says_where_it_cannot_write(vramplan: Shell, tmp_path: Path):
    (tmp_path / "file").write_text("")
    assert vramplan("plan", *LLAMA, *H100S, "-o", str(tmp_path / "file" / "out")) == 2
    assert "cannot be written" in vramplan.err


RECORD = {
    "id": "A",
    "spec": {
        "model": {
            "name": "tiny",
            "config": {
                "model_type": "llama",
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "vocab_size": 1000,
            },
        },
        "seq_len": 32,
        "zero": {"stage": 0},
    },
    "measured": {
        "outcome": "ok",
        "train_allocated_peak_bytes": 2_000_000,
        "phases": [
            {"phase": "model_load", "allocated_peak_bytes": 400_000, "allocated_end_bytes": 400_000},
            {"phase": "step1.micro1.forward", "allocated_peak_bytes": 1_900_000, "allocated_end_bytes": 900_000},
        ],
    },
    "env": {"device_type": "cpu"},
}


def records_file(path: Path, *changes: dict[str, Any]) -> Path:
    lines = [json.dumps({**RECORD, **change}) for change in changes]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_compare_answers_every_record(vramplan: Shell, tmp_path: Path):
    strange = {**RECORD["spec"], "model": {"name": "odd", "config": {"model_type": "no_such_family"}}}
    unknown_key = {**RECORD["spec"], "zero": {"stage": 2, "key_of_tomorrow": 1}}
    path = records_file(
        tmp_path / "r.jsonl",
        {},
        {"id": "B", "spec": strange},
        {"id": "C", "spec": unknown_key},
        {"id": "D", "measured": {"outcome": "oom"}},
    )
    answer = vramplan.json("compare", str(path))
    assert vramplan.code == 0
    first, *others = answer["records"]
    assert set(first) == {"id", "predicted_bytes", "measured_bytes", "error_frac", "covered"}
    assert first["covered"] is True
    assert first["error_frac"] == pytest.approx(first["predicted_bytes"] / 2_000_000 - 1)
    assert [each["id"] for each in others] == ["B", "C", "D"]
    assert not any(each["covered"] for each in others)
    assert all(each["error_frac"] is None and each["reason"] for each in others)
    assert "key_of_tomorrow" in others[1]["reason"]
    assert answer["summary"].keys() == {
        "num_records",
        "num_covered",
        "median_abs_error_frac",
        "p95_abs_error_frac",
        "worst_under_frac",
        "worst_over_frac",
    }
    assert (answer["summary"]["num_records"], answer["summary"]["num_covered"]) == (4, 1)
    assert answer["summary"]["median_abs_error_frac"] == abs(first["error_frac"])


def test_compare_prints_a_table_with_phases_on_demand(vramplan: Shell, tmp_path: Path):
    path = records_file(tmp_path / "r.jsonl", {}, {"id": "D", "measured": {"outcome": "oom"}})
    assert vramplan("compare", str(path)) == 0
    assert "1 of 2 records compared" in vramplan.out
    assert "not compared: D" in vramplan.out
    assert "step1.micro1.forward" not in vramplan.out
    assert vramplan("compare", str(path), "--phases") == 0
    assert "step1.micro1.forward" in vramplan.out
    phases = vramplan.json("compare", str(path), "--phases")["records"][0]["phases"]
    assert [each["phase"] for each in phases] == ["model_load", "step1.micro1.forward"]


@pytest.mark.parametrize(
    ("text", "said"), [("{", "line 1: is not JSON"), ("[]", "not an object"), ('{"spec": {}}', "measured")]
)
def test_a_file_that_holds_no_records_is_named(vramplan: Shell, tmp_path: Path, text: str, said: str):
    path = tmp_path / "r.jsonl"
    path.write_text(text + "\n")
    assert vramplan("compare", str(path)) == 2
    assert said in vramplan.err


def test_compare_of_no_records_says_so(vramplan: Shell, tmp_path: Path):
    path = tmp_path / "r.jsonl"
    path.write_text("")
    assert vramplan("compare", str(path)) == 0
    assert "0 records, none compared" in vramplan.out
