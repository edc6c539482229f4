"""Which candidates a search tries, and which requests no layout can make."""

from __future__ import annotations

import pytest

from vramplan.errors import NoPlanError
from vramplan.facts.device import Device, Node
from vramplan.search.space import OPEN_MICRO_BATCH_SIZES, batch_splits, candidates, divisors, layout_of
from vramplan.spec.layout import Layout
from vramplan.spec.run import RunSpec

GIB = 2**30
GPU = Device("GPU", "cuda", 80 * GIB, 79 * GIB)
CPU = Device("CPU", "cpu", 8 * GIB, 4 * GIB)


def ask(**fields: object) -> RunSpec:
    return RunSpec.model_validate({"model": "m", **fields})


def test_divisors():
    assert divisors(1) == [1]
    assert divisors(12) == [1, 2, 3, 4, 6, 12]
    assert divisors(16) == [1, 2, 4, 8, 16]


def test_every_candidate_makes_the_global_batch():
    node = Node(GPU, 4)
    found = candidates(ask(global_batch_size=48), node)
    assert {each.micro_batch_size * each.grad_accum_steps for each in found} == {12}
    assert {each.micro_batch_size for each in found} == {1, 2, 3, 4, 6, 12}
    assert {each.zero_stage for each in found} == {0, 1, 2, 3}
    assert len(found) == len(set(found))


def test_what_the_user_fixed_stays_fixed():
    run = ask(
        global_batch_size=16,
        micro_batch_size=2,
        zero={"stage": 1, "offload_optimizer": "cpu"},
        activation_checkpointing="full",
    )
    (only,) = candidates(run, Node(GPU, 2))
    assert (only.micro_batch_size, only.grad_accum_steps, only.zero_stage) == (2, 4, 1)
    assert (only.offload_optimizer, only.offload_param, only.activation_checkpointing) == ("cpu", "none", "full")


def test_closing_fills_in_everything_and_changes_nothing_that_was_given():
    run = ask(global_batch_size=16, seq_len=128, method={"kind": "lora", "r": 4})
    node = Node(GPU, 2)
    for candidate in candidates(run, node):
        closed = candidate.close(run, node)
        open_fields = (
            closed.micro_batch_size,
            closed.grad_accum_steps,
            closed.activation_checkpointing,
            closed.layout,
            closed.optimizer.lr,
            *closed.zero.model_dump(exclude={"nvme_path"}).values(),  # which names a place only where NVMe is used
        )
        assert None not in open_fields
        assert closed.global_batch_size == 16
        assert (closed.seq_len, closed.method) == (run.seq_len, run.method)
        assert closed.zero.overlap_comm == (candidate.zero_stage == 3)


def test_without_a_global_batch_micro_batches_are_tried_up_to_a_limit():
    found = candidates(ask(), Node(GPU, 8))
    assert {each.micro_batch_size for each in found} == set(OPEN_MICRO_BATCH_SIZES)
    assert {each.grad_accum_steps for each in found} == {1}
    assert {each.grad_accum_steps for each in candidates(ask(grad_accum_steps=4), Node(GPU, 8))} == {4}


def test_offload_is_searched_on_gpus_only_and_where_the_stage_can_do_it():
    on_gpu = {(each.zero_stage, each.offload_optimizer, each.offload_param) for each in candidates(ask(), Node(GPU, 2))}
    assert (3, "cpu", "cpu") in on_gpu
    assert not any(param == "cpu" and stage != 3 for stage, _, param in on_gpu)
    assert not any(optimizer == "cpu" and stage == 0 for stage, optimizer, _ in on_gpu)
    assert {each.offload_optimizer for each in candidates(ask(), Node(CPU, 2))} == {"none"}


def test_an_impossible_offload_that_the_user_fixed_is_kept_for_legality_to_refuse():
    found = candidates(ask(zero={"stage": 2, "offload_param": "cpu"}), Node(GPU, 2))
    assert found
    assert all(each.offload_param == "cpu" and each.zero_stage == 2 for each in found)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"global_batch_size": 12}, "set global_batch_size to 8 or 16, or use 6 ranks"),
        ({"global_batch_size": 3}, "set global_batch_size to 8, or use 3 ranks"),
        ({"global_batch_size": 64, "micro_batch_size": 3}, "set micro_batch_size to one of 1, 2, 4, 8"),
        ({"global_batch_size": 64, "grad_accum_steps": 5}, "set grad_accum_steps to one of 1, 2, 4, 8"),
        ({"global_batch_size": 64, "micro_batch_size": 2, "grad_accum_steps": 2}, "set global_batch_size 32"),
        ({"layout": {"dp": 4}}, "set layout.dp to 8"),
        ({"layout": {"dp": 1, "tp": 3}}, "change one of them"),
    ],
    ids=str,
)
def test_a_request_that_no_layout_can_make_names_the_number_to_change(fields, said):
    with pytest.raises(NoPlanError) as caught:
        candidates(ask(**fields), Node(GPU, 8))
    assert said in str(caught.value)


def test_data_parallel_ranks_only_share_the_batch():
    run = ask(global_batch_size=8, layout={"dp": 2, "sp": 4})
    assert layout_of(run, Node(GPU, 8)) == Layout(dp=2, sp=4)
    assert batch_splits(run, 2) == [(1, 4), (2, 2), (4, 1)]


def test_accumulation_follows_from_a_fixed_micro_batch():
    assert batch_splits(ask(global_batch_size=32, micro_batch_size=4), 4) == [(4, 2)]
    assert batch_splits(ask(global_batch_size=32, grad_accum_steps=8), 4) == [(1, 8)]
    assert batch_splits(ask(micro_batch_size=4, grad_accum_steps=3), 4) == [(4, 3)]
