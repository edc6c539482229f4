"""How ZeRO-1 and 2 lay weights end to end, and what a reduction flattens."""

import pytest

from vramplan.memory.partition import flat_groups, flushes

PARAMS = (("a", 2), ("b", 3), ("c", 5), ("d", 4))


def test_round_robin_lays_every_other_tensor_first():
    flat = flat_groups((PARAMS,), 2, round_robin=True)
    assert flat.offsets == {"a": (0, 2), "c": (2, 7), "b": (7, 10), "d": (10, 14)}
    assert flat.partition_numel == 8


def test_aligned_tensors_begin_at_multiples():
    flat = flat_groups((PARAMS,), 2, alignment=4)
    assert flat.offsets == {"a": (0, 2), "b": (4, 7), "c": (8, 13), "d": (16, 20)}
    assert flat.padded_numel == 20


def test_each_group_has_a_buffer_and_a_part_of_its_own():
    flat = flat_groups((PARAMS[2:], PARAMS[:2]), 2)
    assert flat.offsets == {"c": (0, 5), "d": (5, 9), "a": (0, 2), "b": (2, 5)}
    assert flat.partitions == (6, 4)
    assert (flat.owned(0), flat.owned(1)) == ({"c": 5, "d": 1, "a": 2, "b": 2}, {"d": 3, "b": 1})


@pytest.mark.parametrize(
    ("reduces", "copied", "sent"),
    [
        ("slices", 14, 14),  # all parts of the one bucket together
        ("ranks", 8, 8),  # rank 0 owns a, b and 3 of c, in two slices; rank 1 has 6 elements
        ("bucket", 0, 14),
        ("gradients", 14, 14),
    ],
)
def test_what_a_reduction_flattens(reduces, copied, sent):
    (flush,) = flushes(("d", "c", "b", "a"), flat_groups((PARAMS,), 2), 100, reduces=reduces)
    assert (flush.copied, flush.sent) == (copied, sent)
