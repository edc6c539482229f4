"""Specs from YAML and options: what they mean, and what a mistake is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from vramplan.errors import SpecError
from vramplan.spec.load import load_run, merge, nest, parse_assignments, read_yaml_mapping, run_from_mapping

RECIPE = """\
model: meta-llama/Llama-3.1-8B
method: {kind: lora, r: 8}
zero: {stage: 2}
seq_len: 1024
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def test_a_file_is_read_and_overrides_are_laid_over_it(recipe: Path):
    run = load_run(recipe, {"seq_len": 2048, "zero": {"stage": 3}})
    assert (run.seq_len, run.zero.stage) == (2048, 3)
    assert run.method.kind == "lora"
    assert run.method.r == 8


def test_a_method_may_be_written_as_its_bare_name():
    assert run_from_mapping({"model": "m", "method": "qlora"}).method.kind == "qlora"
    assert run_from_mapping({"model": "m", "optimizer": "sgd"}).optimizer.kind == "sgd"


def test_a_method_without_a_kind_is_full_training_if_it_has_no_key_of_adapters():
    method = run_from_mapping({"model": "m", "method": {"train_last_blocks": 2}}).method
    assert (method.kind, method.train_last_blocks) == ("full", 2)


def test_true_and_false_stay_where_they_belong():
    fields = {"model_config_fields": {"tie_word_embeddings": True}, "zero": {"overlap_comm": True}, "tiled_mlp": False}
    run = run_from_mapping({"model": "m", **fields})
    assert (run.model_config_fields, run.zero.overlap_comm) == ({"tie_word_embeddings": True}, True)


def test_scientific_notation_without_a_dot_is_a_number():
    assert run_from_mapping({"model": "m", "optimizer": {"lr": "1e-5"}}).optimizer.lr == 1e-5


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"zero": {"stagee": 3}}, "unknown key 'stagee' in zero; did you mean stage?"),
        ({"seqlen": 5}, "unknown key 'seqlen'; did you mean seq_len"),
        ({"method": {"kind": "lora", "rr": 1}}, "unknown key 'rr' in method; did you mean r?"),
        ({"layout": {"dq": 2}}, "unknown key 'dq' in layout; did you mean dp?"),
        ({"qqqqqqqq": 1}, "unknown key 'qqqqqqqq'; known: activation_checkpointing"),
        ({"zero": {"stage": 5}}, "zero.stage is 5 but must be 0, 1, 2 or 3"),
        ({"precision": "bf17"}, "did you mean bf16?"),
        ({"training": {"trackers": "wandb"}}, "training.trackers is 'wandb' but must be a list"),
        ({"method": "lorra"}, "method.kind is 'lorra' but must be 'full', 'lora' or 'qlora'; did you mean lora?"),
        ({"method": {"r": 3}}, "method needs a 'kind': full, lora or qlora"),
        ({"seq_len": 0}, "seq_len is 0 but must be at least 1"),
        ({"training": {"warmup_frac": 1.5}}, "training.warmup_frac is 1.5 but must be at most 1"),
        ({"optimizer": {"lr": "fast"}}, "optimizer.lr is 'fast' but must be a valid number"),
        ({"zero": 3}, "zero is 3 but must be a mapping"),
        ({"seq_len": "many"}, "seq_len is 'many' but must be a valid integer"),
        ({"precision": "fp16", "bf16_master_weights_and_grads": True}, "needs precision bf16, not fp16"),
        ({"bf16_optimizer_states": True}, "bf16_optimizer_states needs bf16_master_weights_and_grads: set it true"),
        ({"engine": "torch", "grad_accum_dtype": "fp32"}, "grad_accum_dtype is DeepSpeed's: leave it out"),
        ({"zero": {"stage": True}}, "zero.stage is true but takes 0, 1, 2, 3 or null"),
        ({"micro_batch_size": True}, "micro_batch_size is true but takes whole number at least 1, or null"),
        ({"method": {"kind": "lora", "r": True}}, "method.r is true but takes"),
        ({"data": {"train": [{"path": "x", "weight": True}]}}, "data.train.0.weight is true but takes"),
        ({"layout": {"dp": True}}, "layout.dp is true but takes whole number"),
    ],
    ids=str,
)
def test_each_mistake_is_one_sentence_with_file_and_key(fields, said):
    with pytest.raises(SpecError) as caught:
        run_from_mapping({"model": "m", **fields}, source="r.yaml")
    text = str(caught.value)
    assert text.startswith("r.yaml: ")
    assert said in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {"data": {"train": [{"path": "a", "weight": 1}, {"path": "b"}]}},
            "data.train: give every source a weight, or none",
        ),
        ({"data": {"train": []}}, "data.train is [] but must have at least 1"),
        (
            {"data": {"eval": ["a", "b"]}},
            "data.eval is ['a', 'b'] but must be a path or a source (a mapping with path)",
        ),
        (
            {"data": {"eval_sets": {"general": {"path": "a", "wieght": 1}}}},
            "unknown key 'wieght' in data.eval_sets.general; did you mean weight",
        ),
        (
            {"data": {"augment": {"prompt_templates": ["no place"]}}},
            "data.augment.prompt_templates: 'no place' must hold {prompt} exactly once",
        ),
        ({"method": {"kind": "full", "freeze": ["("]}}, "method.freeze: '(' is no regular expression"),
    ],
)
def test_what_fields_demand_of_each_other_is_said_with_their_key(fields, said):
    with pytest.raises(SpecError) as caught:
        run_from_mapping({"model": "m", **fields})
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"seq_len": "many"}, "seq_len is 'many' but must be a valid integer"),
        ({"tiled_mlp": "maybe"}, "tiled_mlp is 'maybe' but must be true or false"),
        ({"data": {"train": [5]}}, "data.train.0 is 5 but must be a mapping of keys"),
    ],
)
def test_nothing_is_said_beside_what_is_wrong(fields, said):
    with pytest.raises(SpecError) as caught:
        run_from_mapping({"model": "m", **fields})
    assert str(caught.value) == said


def test_a_missing_model_is_said():
    with pytest.raises(SpecError, match="model is missing"):
        run_from_mapping({"seq_len": 8})


def test_several_mistakes_are_told_together_and_no_more_than_four():
    fields = {"model": "m", "seq_len": 0, "precision": "x", "attention": "x", "loss": "x", "bad": 1, "worse": 1}
    with pytest.raises(SpecError, match=r"; and 2 more$"):
        run_from_mapping(fields)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("model: [", "is not valid YAML"),
        ("model: a\nmodel: b\n", "key 'model' is written twice (line 2)"),
        ("- model\n", "must hold a mapping of keys such as 'model: NAME', not a list"),
        ("", "not nothing"),
    ],
)
def test_a_file_that_is_no_spec_is_named(tmp_path: Path, content: str, said: str):
    path = tmp_path / "r.yaml"
    path.write_text(content)
    with pytest.raises(SpecError) as caught:
        read_yaml_mapping(path)
    assert str(path) in str(caught.value)
    assert said in str(caught.value)


def test_a_file_that_is_not_there_or_not_text_is_named(tmp_path: Path):
    with pytest.raises(SpecError, match="No such file"):
        read_yaml_mapping(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\xff")
    with pytest.raises(SpecError, match="not UTF-8"):
        read_yaml_mapping(tmp_path / "binary.yaml")


def test_yaml_tags_build_nothing(tmp_path: Path):
    path = tmp_path / "r.yaml"
    path.write_text("model: !!python/object/apply:os.getcwd []\n")
    with pytest.raises(SpecError, match="not valid YAML"):
        read_yaml_mapping(path)


def test_merge_goes_section_by_section():
    merged = merge({"zero": {"stage": 2, "reduce_bucket_size": 5}, "seq_len": 1}, {"zero": {"stage": 3}})
    assert merged == {"zero": {"stage": 3, "reduce_bucket_size": 5}, "seq_len": 1}


def test_a_changed_kind_drops_what_only_the_old_kind_has():
    assert merge({"method": {"kind": "lora", "r": 8}}, {"method": "full"}) == {"method": {"kind": "full"}}
    kept = merge({"method": {"kind": "lora", "r": 8}}, {"method": {"kind": "lora", "alpha": 4}})
    assert kept == {"method": {"kind": "lora", "r": 8, "alpha": 4}}


def test_a_changed_kind_keeps_what_the_new_kind_has_too():
    run = {"model": "m", "method": {"kind": "lora", "r": 64}, "optimizer": {"kind": "adamw_torch", "lr": 3e-3}}
    laid = run_from_mapping(merge(run, {"method": {"kind": "qlora"}, "optimizer": "lion"}))
    assert (laid.method.kind, laid.method.r) == ("qlora", 64)
    assert (laid.optimizer.kind, laid.optimizer.lr) == ("lion", 3e-3)


def test_assignments_are_nested_and_read_as_yaml():
    fields = parse_assignments(["zero.reduce_bucket_size=1000", "zero.stage=3", "attention_mask=true", "model=a=b"])
    assert fields == {"zero": {"reduce_bucket_size": 1000, "stage": 3}, "attention_mask": True, "model": "a=b"}
    assert nest("a.b.c", 1) == {"a": {"b": {"c": 1}}}


@pytest.mark.parametrize("text", ["zero.stage", "=3", "a=["])
def test_a_malformed_assignment_is_named(text: str):
    with pytest.raises(SpecError, match=r"--set"):
        parse_assignments([text])
