"""The recipes of ``configs/``: each says why, is a spec, is planned, and fits by simulation too."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from vramplan import plan
from vramplan.cli.app import main
from vramplan.errors import UnknownNameError
from vramplan.simulate.verify import verify_plan
from vramplan.spec.check import check_run
from vramplan.spec.load import load_run, merge, run_from_mapping
from vramplan.spec.recipes import ADAPTER_RANKS, TASKS, read_recipe
from vramplan.spec.trainable import LoraMethod

CONFIGS = Path(__file__).parents[3] / "configs"
SMALL = {
    "model": "small",
    "model_config_fields": {
        "model_type": "llama",
        "hidden_size": 128,
        "intermediate_size": 352,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 4000,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
    },
    "global_batch_size": 4,
    "micro_batch_size": 2,
    "hardware": {"gpu": "rtx4090"},
}
"""A model that is simulated in a second."""


def test_every_recipe_is_of_a_task_or_the_demo():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == {*TASKS, "demo-smollm2-lora"}


@pytest.mark.parametrize("task", TASKS)
def test_a_recipe_gives_reasons_and_runs_as_it_stands(task):
    recipe = read_recipe(task)
    commented = [line for line in recipe.text.splitlines() if "#" in line]
    assert len(commented) > 0.4 * len([line for line in recipe.text.splitlines() if line.strip()])
    for word in ("Base model", "adapters", "full", "epochs"):
        assert word in recipe.text
    run = load_run(CONFIGS / f"{task}.yaml")
    check_run(run)
    assert plan(run, hardware={"gpu": "rtx4090"}).prediction.used_peak_bytes < 24 * 2**30


@pytest.mark.parametrize(
    "task", [pytest.param(task, marks=pytest.mark.slow if place % 2 else ()) for place, task in enumerate(TASKS)]
)
def test_a_recipe_is_simulated(task):
    planned = plan(merge(read_recipe(task).fields, SMALL))
    verified = verify_plan(planned)
    assert verified.found.fits
    predicted, found = planned.prediction.allocated_peak_bytes, verified.found.allocated_peak_bytes
    if planned.run.retain.kl is None and not planned.run.masked:  # these the simulator leaves out
        assert found == pytest.approx(predicted, rel=0.01)
    assert found <= 1.01 * predicted


@pytest.mark.parametrize("task", TASKS)
def test_no_prompt_ends_with_a_blank_of_its_own(task):
    for template in load_run(CONFIGS / f"{task}.yaml").data.augment.prompt_templates:
        assert not template.endswith(" ")


def init(*arguments):
    with pytest.raises(SystemExit) as end:
        main(["init", *map(str, arguments)])
    return end.value.code


def test_init_writes_the_recipe_as_it_is(tmp_path):
    assert init("--task", "sft-base", "-o", tmp_path / "a" / "run.yaml") == 0
    assert (tmp_path / "a" / "run.yaml").read_text() == (CONFIGS / "sft-base.yaml").read_text()


def test_init_puts_in_what_is_given_and_leaves_the_rest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    awkward = 'my data/a: "b", {c}.jsonl'
    Path(awkward).parent.mkdir()
    Path(awkward).touch()
    given = ["--model", "Qwen/Qwen2.5-7B-Instruct", "--method", "qlora", "--data", awkward, "--general", "hub:x/y"]
    assert init("--task", "sft-chat", "-o", tmp_path / "run.yaml", *given) == 0
    before, after = read_recipe("sft-chat").text, (tmp_path / "run.yaml").read_text()
    assert [line.partition("#")[2] for line in after.splitlines()] == [
        line.partition("#")[2] for line in before.splitlines()
    ]
    fields, asked = yaml.safe_load(before), yaml.safe_load(after)
    fields |= {"model": "Qwen/Qwen2.5-7B-Instruct", "method": {"kind": "qlora"}}
    fields["data"]["train"], fields["data"]["replay"]["path"] = awkward, "hub:x/y"
    assert asked == fields


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--task", "chat"], "unknown task 'chat'; did you mean sft-chat? (tasks: sft-chat, sft-base, domain-cpt"),
        (["--task", "classify", "--general", "x.jsonl"], "the recipe for classify replays nothing"),
        (["--task", "sft-chat", "--method", "lorra"], "did you mean lora?"),
        (["--task", "sft-chat", "-o", "there.yaml"], "there.yaml exists"),
        (["--task", "sft-chat", "--model", "Qwen/Qwen2.5-7B-Instrct"], "did you mean Qwen/Qwen2.5-7B-Instruct"),
        (["--task", "sft-base", "--data", "mine.jsonl"], "--data: mine.jsonl: there is no such file"),
        (["--task", "sft-base", "--data", "mine/*.jsonl"], "--data: mine/*.jsonl: no file matches it"),
        (["--task", "sft-base", "--data", "there.yaml"], "--data: there.yaml: is of no known kind"),
        (["--task", "sft-chat", "--general", "builtin:python"], "did you mean builtin:python-reference or"),
        (["--task", "domain-cpt", "--method", "dora"], "retain.interpolate cannot scale DoRA's adapters"),
    ],
)
def test_what_init_cannot_do_is_one_sentence(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("there.yaml").touch()
    assert init(*arguments) == 2
    assert said in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["there.yaml"]


def test_init_says_where_no_plan_can_be_made_of_the_recipe(tmp_path, capsys):
    given = ["--task", "sft-chat", "--method", "lora", "--model", "meta-llama/Llama-4-Scout-17B-16E-Instruct"]
    assert init(*given, "-o", tmp_path / "run.yaml") == 0
    assert (
        "note: as it stands `vramplan plan` refuses it: method.target_modules 'all-linear'" in capsys.readouterr().out
    )
    assert init("--task", "sft-chat", "--model", "Qwen/Qwen2.5-7B-Instruct", "-o", tmp_path / "other.yaml") == 0
    assert "note:" not in capsys.readouterr().out


@pytest.mark.parametrize("task", ADAPTER_RANKS)
def test_adapters_in_place_of_full_training_have_the_rank_that_the_recipe_asks_for(task, tmp_path):
    rank = ADAPTER_RANKS[task]
    assert f"r {rank} and more" in read_recipe(task).text
    assert init("--task", task, "--method", "qlora", "-o", tmp_path / "run.yaml") == 0
    assert load_run(tmp_path / "run.yaml").method == LoraMethod(kind="qlora", r=rank)


def test_dora_is_named_like_the_other_methods(tmp_path):
    assert init("--task", "sft-chat", "--method", "dora", "-o", tmp_path / "run.yaml") == 0
    assert load_run(tmp_path / "run.yaml").method == LoraMethod(use_dora=True)
    run = run_from_mapping(merge({"model": "x", "method": {"kind": "lora", "r": 8}}, {"method": "dora"}))
    assert run.method == LoraMethod(r=8, use_dora=True)


def test_an_unknown_task_is_an_error():
    with pytest.raises(UnknownNameError):
        read_recipe("nonsense")
