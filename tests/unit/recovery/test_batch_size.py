"""``find_executable_batch_size``: only sizes that divide the global batch, memory freed, other errors passed on."""

from __future__ import annotations

import weakref

import pytest

from vramplan.recovery import find_executable_batch_size


class Activations:
    """Something that a failed call holds."""


def full(size: int, room: int) -> None:
    if size > room:
        raise RuntimeError("CUDA error: out of memory")  # a text that accelerate does not know


def test_sizes_divide_the_global_batch():
    tried = []

    @find_executable_batch_size(starting_batch_size=12, gradient_accumulation_steps=2)
    def train(batch_size, gradient_accumulation_steps):
        tried.append((batch_size, gradient_accumulation_steps))
        full(batch_size, 5)
        return batch_size

    assert train() == 4
    assert tried == [(12, 2), (8, 3), (6, 4), (4, 6)]
    tried.clear()
    assert train() == 4
    assert tried == [(4, 6)]  # what was found stays


def test_a_reduction_is_an_upper_bound():
    tried, sizes = [], iter([7, 3])

    def train(batch_size, gradient_accumulation_steps):
        tried.append(batch_size)
        full(batch_size, 2)

    find_executable_batch_size(train, starting_batch_size=16, reduce_batch_size_fn=lambda: next(sizes))()
    assert tried == [16, 4, 2]


def test_what_a_failed_call_held_is_gone_before_the_next():
    held = []

    @find_executable_batch_size(starting_batch_size=4)
    def train(batch_size, **_):
        assert not [ref for ref in held if ref() is not None]
        activations = Activations()
        held.append(weakref.ref(activations))
        full(batch_size, 1)

    train()
    assert len(held) == 3


def test_arguments_and_name_are_passed_on():
    @find_executable_batch_size(starting_batch_size=2)
    def train(batch_size, model, gradient_accumulation_steps, *, lr):
        return batch_size, model, gradient_accumulation_steps, lr

    assert train("model", lr=3) == (2, "model", 1, 3)
    assert train.__name__ == "train"


def test_other_errors_are_not_tried_again():
    @find_executable_batch_size(starting_batch_size=4)
    def train(batch_size, gradient_accumulation_steps):
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        train()


def test_it_ends_at_one():
    @find_executable_batch_size(starting_batch_size=4)
    def train(batch_size, gradient_accumulation_steps):
        full(batch_size, 0)

    with pytest.raises(RuntimeError, match=r"memory runs out with a batch of 1 \(CUDA error: out of memory\)"):
        train()


def test_a_function_that_cannot_accumulate_is_refused():
    with pytest.raises(TypeError, match=r"train\(\) must take gradient_accumulation_steps"):

        @find_executable_batch_size(starting_batch_size=4)
        def train(batch_size):
            return batch_size
