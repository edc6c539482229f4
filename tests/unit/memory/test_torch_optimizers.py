"""Bytes of plain PyTorch's optimizers: what they keep and the highest instant of a step, as their loops make them."""

import pytest

from vramplan.errors import UnknownNameError
from vramplan.memory.torch_optimizers import Steps, handed_to_deepspeed, torch_optimizer

PARAMS = ((1000, 70), (10, 10), (4000, 130))
"""A matrix, a vector, a larger matrix."""


def steps(kind, device="cpu", width=4, momentum=0.0):
    return Steps(torch_optimizer(kind, device, momentum), (PARAMS,), width)


def test_states_have_the_format_of_their_parameter():
    assert steps("adamw_torch", width=2).state_bytes == 2 * 2 * 5010
    assert steps("adamw_torch", width=4).state_bytes == 2 * 4 * 5010


def test_one_tensor_at_a_time_holds_what_the_one_before_left():
    assert steps("adamw_torch").highest(False) == (8 * 5010, 4 * (10 + 2 * 4000))


def test_all_at_once_makes_a_list_as_large_as_the_parameters():
    assert steps("adamw_torch", "cuda", width=2).highest(False) == (4 * 5010, 2 * 5010)


def test_a_fused_step_makes_nothing():
    assert steps("adamw_torch_fused", "cuda").highest(False) == (8 * 5010, 0)


def test_sgd_keeps_nothing_without_momentum():
    assert steps("sgd").highest(False) == (0, 4 * 4000)
    assert steps("sgd", momentum=0.9).state_bytes == 4 * 5010


def test_buffers_made_in_turn_are_not_all_there_at_the_first_step():
    params = ((4000, 130), (1000, 70))
    first = Steps(torch_optimizer("sgd", "cpu", 0.9), (params,), 4).highest(True)
    assert first == (4 * 4000, 4 * 4000)


def test_adafactor_keeps_rows_and_columns_in_fp32():
    assert steps("adafactor", width=2).state_bytes == 4 * (70 + 10 + 130)
    assert steps("adafactor", width=2).highest(False)[1] == 4 * (10 + 4 * 4000)


def test_large_states_of_a_paged_optimizer_lie_apart():
    params = ((99_999, 400), (100_000, 400))
    paged = Steps(torch_optimizer("paged_adamw", "cuda", 0.0), (params,), 2)
    assert (paged.state_bytes, paged.paged_bytes) == (8 * 99_999, 8 * 100_000)
    in_8_bits = Steps(torch_optimizer("paged_adamw_8bit", "cuda", 0.0), (params,), 2)
    assert in_8_bits.paged_bytes == 2 * 100_000
    assert in_8_bits.state_bytes == 2 * 99_999 + 2 * 4 * (391 + 391) + 2 * 256 * 4


def test_lion_keeps_one_fp32_moment():
    assert steps("lion", "cuda", width=2).highest(False) == (4 * 5010, 0)


def test_torchs_own_adafactor_has_rows_and_columns_of_the_parameters_format():
    found = Steps(handed_to_deepspeed("adafactor", "cpu", 0.0), (PARAMS,), 4)
    assert found.highest(False) == (4 * (70 + 10 + 130), 4 * (10 + 4000))


def test_an_optimizer_that_is_not_known_is_one_sentence():
    with pytest.raises(UnknownNameError, match="lion"):
        torch_optimizer("lion", "cpu", 0.0)


def test_groups_are_updated_one_after_the_other():
    groups = ((PARAMS[0], PARAMS[1]), (PARAMS[2],))
    at_once = Steps(torch_optimizer("adamw_torch", "cuda", 0.0), groups, 4)
    assert at_once.highest(False) == (8 * 5010, 4 * 4000)
    assert Steps(torch_optimizer("adamw_torch", "cuda", 0.0), groups[::-1], 4).highest(True) == (8 * 4000, 4 * 4000)
    in_turn = Steps(torch_optimizer("adamw_torch", "cpu", 0.0), groups, 4)
    assert in_turn.highest(False) == (8 * 5010, 4 * 2 * 4000)  # nothing is left over from the group before
    left_over = Steps(torch_optimizer("adafactor", "cpu", 0.0), groups, 4)
    assert left_over.highest(False)[1] == 4 * (10 + 2 * 4000)  # transformers' loops in one function
