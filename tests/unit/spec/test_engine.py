"""What engine torch cannot run is answered with the field to change."""

import pytest

import vramplan
from vramplan.errors import SpecError

RUN = {"model": "Qwen/Qwen2.5-0.5B", "engine": "torch", "hardware": {"gpu": "a100-80gb"}, "seq_len": 512}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"precision": "fp16"}, "GradScaler"),
        ({"zero": {"stage": 2}}, "zero.stage is 2"),
        ({"zero": {"offload_optimizer": "cpu"}}, "offloads nothing"),
        ({"layout": {"dp": 1, "sp": 2}}, "data parallel only"),
        ({"retain": {"kl": {"weight": 0.1}}}, "retain.kl is a hook of the trainer"),
        ({"engine": "deepspeed", "precision": "bf16-weights-autocast"}, "needs engine torch"),
    ],
)
def test_a_contradiction_names_its_field(change, says):
    with pytest.raises(SpecError, match=says):
        vramplan.fit(RUN | change)


def test_only_one_way_to_partition_is_searched():
    answer = vramplan.fit(RUN)
    assert "plain PyTorch" in str(answer)
    assert answer.plan.run.zero.stage == 0
