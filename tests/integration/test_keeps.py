"""What ends a run in good order, and what it goes on with: early stops, springs, adapters, references, full disks."""

from __future__ import annotations

import json
import shutil
import subprocess

import pytest
import torch
from safetensors.torch import load_file

from vramplan.measure.compare import compare_file
from vramplan.measure.run_dir import RunDir

from support.tiny_model import save_tiny_model
from support.training import ROOT, command, events_of, losses, train, write_spec

pytestmark = pytest.mark.ranks

SPRINGS = {"ewc": {"data": "builtin:python-reference", "samples": 3, "weight": 0.5}, "l2sp": {"weight": 0.5}}
ONE_RANK = {"hardware": {"gpu": "cpu", "gpus_per_node": 1}, "grad_accum_steps": 4}


def test_early_stopping_ends_a_run_and_saves_it(tiny_model, tmp_path):
    spec = write_spec(
        tmp_path / "spec.yaml",
        tiny_model,
        0,
        **ONE_RANK,
        data={"eval_sets": {"general": "builtin:python-reference"}, "eval_max": 4},
        retain={"early_stop": {"set": "general", "max_rise_frac": 1e-6}},
        optimizer={"kind": "sgd", "lr": 5.0},
        training={"max_steps": 50, "eval_every": 1, "save_every": 50, "warmup_frac": 0.0},
    )
    done = train(spec, "-o", tmp_path / "run")
    assert done.returncode == 0, done.stdout + done.stderr
    (stopped,) = [event for event in events_of(tmp_path / "run", "note") if "retain.early_stop" in event["text"]]
    last = max(losses(tmp_path / "run"))
    assert last < 50
    assert f"stopped after step {last}" in stopped["text"]
    assert [event["step"] for event in events_of(tmp_path / "run", "checkpoint")] == [last]
    assert events_of(tmp_path / "run", "end")[0]["step"] == last
    assert (RunDir(tmp_path / "run").model / "model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_springs_go_on_bit_for_bit_after_a_resume(tiny_model, tmp_path, stage):
    """The anchors and the Fisher diagonal are made again from the base model, not from the checkpoint's weights."""
    spec = write_spec(tmp_path / "spec.yaml", tiny_model, stage, retain=SPRINGS)
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    done = train(spec, "-o", whole)
    assert done.returncode == 0, done.stdout + done.stderr
    shutil.copytree(whole, resumed)
    shutil.rmtree(RunDir(resumed).checkpoints / "step-00000006")
    shutil.rmtree(RunDir(resumed).model)
    done = train(resumed, "--resume")
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(resumed) == losses(whole)
    weights = "model/model.safetensors"
    assert (resumed / weights).read_bytes() == (whole / weights).read_bytes()


@pytest.mark.slow
def test_new_blocks_under_zero_3_train_as_under_zero_0_and_can_be_loaded(tiny_model, tmp_path):
    """Old blocks stay bit for bit; the new one of each half starts as one that changes nothing and moves."""
    from transformers import AutoModelForCausalLM

    found = {}
    for stage in (0, 3):
        spec = write_spec(tmp_path / "spec.yaml", tiny_model, stage, {"kind": "full", "new_blocks": 2})
        done = train(spec, "-o", tmp_path / str(stage))
        assert done.returncode == 0, done.stdout + done.stderr
        found[stage] = losses(tmp_path / str(stage))
    assert found[3] == pytest.approx(found[0], rel=1e-4)
    model = AutoModelForCausalLM.from_pretrained(RunDir(tmp_path / "3").model)
    assert model.config.num_hidden_layers == 4
    after, before = model.state_dict(), load_file(tiny_model / "model.safetensors")
    for old, new in ((0, 0), (1, 2)):
        for name in [name for name in before if f".layers.{old}." in name]:
            assert torch.equal(after[name.replace(f".layers.{old}.", f".layers.{new}.")], before[name]), name
    assert all(after[f"model.layers.{new}.mlp.down_proj.weight"].abs().sum() > 0 for new in (1, 3))


@pytest.mark.slow
def test_interpolated_adapters_shrink_by_the_share_of_the_base(tiny_model, tmp_path):
    for name, retain in (("plain", {}), ("mixed", {"interpolate": 0.25})):
        spec = write_spec(
            tmp_path / "spec.yaml", tiny_model, 0, "lora", **ONE_RANK, retain=retain, training={"max_steps": 2}
        )
        done = train(spec, "-o", tmp_path / name)
        assert done.returncode == 0, done.stdout + done.stderr
    plain, mixed = (
        load_file(RunDir(tmp_path / name).adapter / "adapter_model.safetensors") for name in ("plain", "mixed")
    )
    assert plain.keys() == mixed.keys()
    for name, tensor in plain.items():
        assert torch.allclose(mixed[name], tensor * (0.75 if "lora_B" in name else 1.0)), name
    assert (RunDir(tmp_path / "mixed").adapter / "README.md").exists()


@pytest.mark.slow
def test_the_reference_under_zero_3_gives_what_a_whole_copy_gives(tiny_model, tmp_path):
    found = {}
    for stage in (0, 3):
        spec = write_spec(
            tmp_path / "spec.yaml", tiny_model, stage, retain={"kl": {"weight": 0.5}}, training={"max_steps": 3}
        )
        done = train(spec, "-o", tmp_path / str(stage))
        assert done.returncode == 0, done.stdout + done.stderr
        found[stage] = losses(tmp_path / str(stage))
    assert found[3] == pytest.approx(found[0], rel=1e-4)
    assert found[0][1] > 0


@pytest.mark.slow
def test_a_full_disk_leaves_the_earlier_checkpoint_whole(tiny_model, tmp_path):
    """A file may not grow past a limit that the earlier checkpoint's shards are just under: writing fails as on a full
    disk, with an error of the operating system."""
    spec = write_spec(tmp_path / "spec.yaml", tiny_model, 0, **ONE_RANK, training={"max_steps": 4, "save_every": 1})
    run_dir = tmp_path / "run"
    done = train(spec, "-o", run_dir, "--max-steps", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    shard = max(path.stat().st_size for path in RunDir(run_dir).checkpoints.rglob("*") if path.is_file())
    limited = ["prlimit", f"--fsize={shard // 2}", *command(run_dir, "--resume", "--max-steps", "4")]
    done = subprocess.run(limited, capture_output=True, text=True, check=False, cwd=ROOT, timeout=240)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.count("\n") == 1
    assert "checkpoint of step 2 cannot be written" in done.stderr
    assert "earlier checkpoints are whole" in done.stderr
    assert [path.name for path in RunDir(run_dir).checkpoints.glob("step-*")] == ["step-00000001"]
    done = train(run_dir, "--resume", "--max-steps", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "goes on after step 1" in done.stdout


def test_a_loss_that_is_not_a_number_leaves_the_last_good_checkpoint(tiny_model, tmp_path):
    """One row's weight makes the loss infinite; the steps before it are saved, and it is named."""
    rows = [{"prompt": f"{i} is", "completion": "good", "w": 1.0} for i in range(40)]
    rows[7]["w"] = 1e308
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = write_spec(
        tmp_path / "spec.yaml",
        tiny_model,
        0,
        **{**ONE_RANK, "grad_accum_steps": 2},
        global_batch_size=2,
        micro_batch_size=1,
        data={"train": {"path": str(data), "weight_column": "w"}, "eval_frac": 0.0},
        training={"max_steps": 20, "save_every": 1},
    )
    done = train(spec, "-o", tmp_path / "run")
    assert done.returncode == 3, done.stdout + done.stderr
    steps = max(losses(tmp_path / "run"), default=0)
    assert "the loss is " in done.stderr
    assert f"at step {steps + 1} " in done.stderr
    assert f"{data} line 8" in done.stderr
    saved = sorted(path.name for path in RunDir(tmp_path / "run").checkpoints.glob("step-*"))
    assert saved[-1:] == ([f"step-{steps:08d}"] if steps else [])


def test_a_tokenizer_larger_than_the_embedding_is_one_sentence(tiny_model, tmp_path):
    from transformers import AutoTokenizer

    grown = tmp_path / "grown"
    shutil.copytree(tiny_model, grown)
    tokenizer = AutoTokenizer.from_pretrained(grown)
    tokenizer.add_tokens([f"<extra{i}>" for i in range(3)])
    tokenizer.save_pretrained(grown)
    done = train(write_spec(tmp_path / "spec.yaml", grown, 0, **ONE_RANK), "-o", tmp_path / "run")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "has 515 tokens but the model's embedding only 512 rows" in done.stderr


def test_all_methods_together_take_what_was_predicted(tmp_path):
    """Of micro-batches smaller than the KL term's chunk."""
    retain = {**SPRINGS, "kl": {"weight": 0.5}}
    cut = {"seq_len": 112, "micro_batch_size": 1, "grad_accum_steps": 4, "training": {"max_steps": 2}}
    model = save_tiny_model(tmp_path / "model", vocab_size=4096, hidden_size=128, intermediate_size=256)
    spec = write_spec(tmp_path / "spec.yaml", model, 2, retain=retain, **cut)
    done = train(spec, "-o", tmp_path / "run")
    assert done.returncode == 0, done.stdout + done.stderr
    (record,) = compare_file(tmp_path / "run" / "record.jsonl").records
    assert abs(record.error_frac) < 0.02, done.stdout
