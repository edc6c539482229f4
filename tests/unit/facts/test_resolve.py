"""Where a model's config is read from, and that it is only read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vramplan.errors import ConfigError, UnknownNameError
from vramplan.facts.resolve import resolve_architecture, resolve_config
from vramplan.spec.run import RunSpec

FIELDS = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 128,
}


def test_fields_in_place_decide_over_the_name():
    assert resolve_architecture(RunSpec(model="gpt2", model_config_fields=FIELDS)).family == "llama"


def test_fields_in_place_that_lack_one_are_told_that_they_replace_the_file(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(FIELDS))
    with pytest.raises(
        ConfigError, match=r"^model_config_fields replaces config\.json as a whole.*'hidden_size' is missing"
    ):
        resolve_architecture(RunSpec(model=str(tmp_path), model_config_fields={"model_type": "llama"}))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ConfigError, match=r"^config\.json of a 'llama' model: field 'hidden_size' is missing"):
        resolve_architecture(RunSpec(model=str(tmp_path)))


def test_a_directory_is_read_and_nothing_in_it_is_run(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(FIELDS))
    (tmp_path / "modeling_custom.py").write_text("raise SystemExit('this ran')")
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    assert resolve_architecture(RunSpec(model=str(tmp_path))).hidden_size == 64


@pytest.mark.parametrize(("text", "said"), [("{", "cannot be read as JSON"), ("[1]", "holds list")])
def test_a_config_that_is_no_object_says_so(tmp_path: Path, text: str, said: str):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=said):
        resolve_config(RunSpec(model=str(tmp_path)))


def test_a_directory_without_a_config_says_so(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"no config\.json"):
        resolve_config(RunSpec(model=str(tmp_path)))


def test_the_catalogue_is_next():
    assert resolve_architecture(RunSpec(model="gpt2")).num_params == 124_439_808


def test_then_the_hub_s_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    snapshot = tmp_path / "hub" / "models--someone--model" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps(FIELDS))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert resolve_config(RunSpec(model="someone/model")) == FIELDS
    with pytest.raises(UnknownNameError):
        resolve_config(RunSpec(model="someone/other"))


def test_an_unreachable_hub_is_said_quickly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("HF_HUB_OFFLINE", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # the discard port: nobody listens
    with pytest.raises(UnknownNameError, match="no connection"):
        resolve_config(RunSpec(model="someone/model"))
