"""Bytes that optimizers keep, as their source makes them."""

import pytest

from vramplan.errors import UnknownNameError
from vramplan.memory.optimizers import optimizer_bytes


def test_two_fp32_moments():
    assert optimizer_bytes("adamw", "cuda").state_bytes(1000, 24) == 8 * 1024


def test_8_bit_moments_have_a_scale_for_each_block_and_two_shared_tables():
    found = optimizer_bytes("adamw_8bit", "cuda").state_bytes(256 * 100 + 1, 4096)
    assert found == 2 * (25601 + 4096) + 2 * 4 * (101 + 16) + 2 * 256 * 4


def test_8_bit_moments_of_small_tensors_stay_in_fp32():
    assert optimizer_bytes("adamw_8bit", "cuda").state_bytes(4095) == 8 * 4095 + 2 * 256 * 4


def test_an_unknown_optimizer_is_one_sentence():
    with pytest.raises(UnknownNameError, match="adamx"):
        optimizer_bytes("adamx", "cuda")


def test_paged_moments_of_large_tensors_lie_apart():
    paged = optimizer_bytes("paged_adamw", "cuda")
    assert (paged.state_bytes(99_999, 100_000), paged.paged_bytes(99_999, 100_000)) == (8 * 99_999, 8 * 100_000)
    in_8_bits = optimizer_bytes("paged_adamw_8bit", "cuda")
    assert in_8_bits.paged_bytes(100_000) == 2 * 100_000
    assert in_8_bits.state_bytes(100_000) == 2 * 4 * 391 + 2 * 256 * 4
