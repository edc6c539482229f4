"""What a checkpoint says of its run, and what is refused because of it."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest

from vramplan.errors import CheckpointError
from vramplan.spec.run import OptimizerSpec, RunSpec, ZeroSpec
from vramplan.train.checkpoint import Resumed
from vramplan.train.pinned import check_pinned_loss
from vramplan.train.state import STATE, RunState, StateLayout, check_same_run


def state_of(run: RunSpec, **fields) -> RunState:
    return RunState.of(run, **{"step": 3, "total_steps": 6, "num_samples": 10, "world_size": 2, **fields})


RUN = RunSpec(model="some/model", precision="fp32", global_batch_size=8, zero=ZeroSpec(stage=2))


def test_what_was_written_is_read(tmp_path):
    state = state_of(RUN, pinned_loss=1.5)
    (tmp_path / STATE).write_text(json.dumps(asdict(state)))
    assert RunState.read(tmp_path) == state


def test_another_versions_state_is_one_sentence(tmp_path):
    (tmp_path / STATE).write_text('{"step": 3, "world_size": 2}')
    with pytest.raises(CheckpointError, match=r"state.json was written by another version of vramplan"):
        RunState.read(tmp_path)


def test_what_decides_the_numbers_must_be_the_same(tmp_path):
    with pytest.raises(CheckpointError, match="was made with precision fp32, this run has bf16"):
        check_same_run(state_of(RUN), state_of(RUN.model_copy(update={"precision": "bf16"})), tmp_path)
    sgd = RUN.model_copy(update={"optimizer": OptimizerSpec(kind="sgd")})
    with pytest.raises(CheckpointError, match="optimizer_state exp_avg, exp_avg_sq, this run has sgd"):
        check_same_run(state_of(RUN), state_of(sgd), tmp_path)


def test_how_the_state_is_cut_may_change(tmp_path):
    other = RUN.model_copy(
        update={"zero": ZeroSpec(stage=3, offload_optimizer="cpu"), "optimizer": OptimizerSpec(kind="adamw_torch")}
    )
    check_same_run(state_of(RUN), state_of(other, world_size=4, step=0), tmp_path)
    assert str(StateLayout.of(RUN, 1)) == "ZeRO 2 on 1 rank"
    assert str(StateLayout.of(other, 4)) == "ZeRO 3 on 4 ranks with optimizer offloaded"


def test_flat_groups_are_stage_3s_only():
    smaller = RUN.model_copy(update={"zero": ZeroSpec(stage=2, sub_group_size=5)})
    assert StateLayout.of(RUN, 2) == StateLayout.of(smaller, 2)
    cut = {"stage": 3, "sub_group_size": 5}
    third, cut_third = (
        StateLayout.of(RUN.model_copy(update={"zero": ZeroSpec(**fields)}), 2) for fields in ({"stage": 3}, cut)
    )
    assert third != cut_third


@pytest.mark.parametrize(("precision", "apart"), [("fp32", 2e-5), ("bf16", 2e-2), ("fp16", 4e-3)])
def test_a_pinned_loss_that_is_not_met_is_refused(tmp_path, precision, apart):
    found = Resumed(replace(state_of(RUN), pinned_loss=2.0), tmp_path, ())
    check_pinned_loss(found, 2.0 * (1 + apart / 4), precision)
    with pytest.raises(CheckpointError, match=r"its pinned batch had loss 2.000000 when it was saved and has"):
        check_pinned_loss(found, 2.0 * (1 + apart), precision)


def test_a_loss_that_is_no_number_does_not_match(tmp_path):
    with pytest.raises(CheckpointError):
        check_pinned_loss(Resumed(replace(state_of(RUN), pinned_loss=2.0), tmp_path, ()), float("nan"), "fp32")
