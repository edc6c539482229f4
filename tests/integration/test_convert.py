"""A checkpoint is resumed by another ZeRO stage, with offload, or on fewer ranks: the state is the same to the bit."""

from __future__ import annotations

import shutil

import pytest
import torch

from vramplan.measure.run_dir import RunDir

from support.ranks import run_workers
from support.training import losses, train, write_spec

pytestmark = pytest.mark.ranks

SAVED = ["0", "2", "3"]
LOADED_BY_TWO = ["0", "3", "2+optimizer"]
LOADED_BY_ONE = ["0", "2"]


@pytest.fixture(scope="module")
def seen(tiny_model, tmp_path_factory):
    """A directory with what each layout saved, and what each other made of it."""
    root = tmp_path_factory.mktemp("converted")
    given = (root, tiny_model, "full", "fp32")
    run_workers("convert_worker", 2, *given, f"save:{','.join(SAVED)}", f"load:{','.join(LOADED_BY_TWO)}", "damage:3")
    run_workers("convert_worker", 1, *given, f"load:{','.join(LOADED_BY_ONE)}")
    return root


@pytest.mark.parametrize("saved", SAVED)
@pytest.mark.parametrize(
    ("loaded", "num_ranks"), [*((each, 2) for each in LOADED_BY_TWO), *((each, 1) for each in LOADED_BY_ONE)]
)
def test_the_state_is_the_same_to_the_bit(seen, saved, loaded, num_ranks):
    before = torch.load(seen / f"{saved}.saved")
    after = torch.load(seen / f"{saved}-{loaded}-{num_ranks}.loaded")
    converted = (saved, 2) != (loaded, num_ranks)
    assert any("was converted to" in note for note in after["notes"]) == converted
    for kind in ("state", "weights"):
        assert after[kind].keys() == before[kind].keys()
        for name, tensor in before[kind].items():
            assert torch.equal(after[kind][name], tensor), name
    assert float(before["state"]["step"]) == 2
    assert after["losses"] == pytest.approx(before["losses"], rel=1e-6)


@pytest.mark.slow
def test_momentum_of_sgd_is_the_same_to_the_bit(tiny_model, tmp_path):
    layouts = ["0+sgd", "2+sgd", "3+sgd"]
    tasks = [f"{task}:{','.join(layouts)}" for task in ("save", "load")]
    run_workers("convert_worker", 2, tmp_path, tiny_model, "full", "fp32", *tasks)
    _assert_all_same(tmp_path, layouts, "momentum_buffer")


@pytest.mark.slow
def test_momentum_of_lion_is_the_same_to_the_bit(tiny_model, tmp_path):
    layouts = ["1+lion", "2+lion", "3+lion"]
    tasks = [f"{task}:{','.join(layouts)}" for task in ("save", "load")]
    run_workers("convert_worker", 2, tmp_path, tiny_model, "full", "fp32", *tasks)
    _assert_all_same(tmp_path, layouts, "exp_avg")


def _assert_all_same(root, layouts, moment):
    for saved in layouts:
        before = torch.load(root / f"{saved}.saved")
        assert any(moment in name for name in before["state"])
        for loaded in layouts:
            after = torch.load(root / f"{saved}-{loaded}-2.loaded")
            assert any("was converted to" in note for note in after["notes"]) == (saved != loaded)
            for kind in ("state", "weights"):
                assert after[kind].keys() == before[kind].keys()
                for name, tensor in before[kind].items():
                    assert torch.equal(after[kind][name], tensor), f"{saved} to {loaded}: {name}"
            assert after["losses"] == pytest.approx(before["losses"], rel=1e-6)


def test_a_wrong_checksum_is_one_sentence_on_every_rank(seen):
    said = {(seen / f"damage.rank{rank}").read_text() for rank in range(2)}
    assert len(said) == 1
    (sentence,) = said
    assert sentence.endswith("in the converted state does not have the content that was written")
    assert "\n" not in sentence


def test_train_goes_on_under_another_plan(finished_run, copy_of_run, tiny_model, tmp_path):
    """Adapters of ZeRO-3 on two ranks go on without ZeRO on one; the data does not notice."""
    run_dir = copy_of_run(3, "lora")
    shutil.rmtree(RunDir(run_dir).checkpoints / "step-00000006")
    one = {"grad_accum_steps": 4, "hardware": {"gpu": "cpu", "gpus_per_node": 1}}
    done = train(write_spec(tmp_path / "spec.yaml", tiny_model, 0, "lora", **one), "-o", run_dir, "--resume")
    assert done.returncode == 0, done.stderr
    assert "checkpoint step-00000003 of ZeRO 3 on 2 ranks was converted to ZeRO 0 on 1 rank" in done.stdout
    assert losses(run_dir) == pytest.approx(losses(finished_run(3, "lora")), rel=1e-5)
