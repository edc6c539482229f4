"""Liger's fused loss: its chunks, what it keeps for backward, and that no batch needs more than whole logits do."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vramplan.errors import SpecError
from vramplan.facts.device import Node
from vramplan.facts.devices import find_device
from vramplan.facts.dtype import Dtype
from vramplan.facts.resolve import resolve_architecture
from vramplan.memory.blocks.context import BlockContext
from vramplan.memory.blocks.fused_loss import _lowered_chunks, rows_at_once
from vramplan.memory.estimate import estimate
from vramplan.memory.leaf import Parameter
from vramplan.memory.size import const
from vramplan.memory.tape import Tape
from vramplan.spec.run import RunSpec

NODE = Node(find_device("h100-80gb"), 1)


def found(loss, micro=1, seq_len=1024, **fields):
    run = RunSpec.model_validate(
        {
            "model": "Qwen/Qwen2.5-0.5B",
            "loss": loss,
            "seq_len": seq_len,
            "micro_batch_size": micro,
            "grad_accum_steps": 1,
            "activation_checkpointing": "full",
            "zero": {"stage": 0},
            **fields,
        }
    )
    return estimate(run, NODE, resolve_architecture(run))


def test_a_chunk_is_a_power_of_two_or_all_tokens():
    assert rows_at_once(4096, 128256, 4096) == 128  # the example of the kernel's comments, with another vocabulary
    assert rows_at_once(16384, 32000, 4096) == 2048
    assert rows_at_once(100, 1000, 4096) == 100


def test_forward_ends_with_both_gradients_and_no_logits():
    phases = {phase.phase: phase for phase in found("liger").phases}
    loaded = phases["engine_init"].end_bytes
    whole = {phase.phase: phase for phase in found("hf").phases}
    hidden, vocab, tokens = 896, 151936, 1024
    kept = 2 * tokens * hidden + 2 * vocab * hidden
    left = phases["step1.micro1.forward"].end_bytes - loaded
    other = whole["step1.micro1.forward"].end_bytes - loaded
    # whole logits leave log-probabilities in fp32, the targets, and the normed states that the head's gradient needs
    assert left - kept == pytest.approx(other - 4 * vocab * tokens - 2 * tokens * hidden, abs=64 * 1024)


@given(st.integers(1, 8), st.sampled_from([128, 512, 2048]))
def test_no_batch_needs_more_than_whole_logits(micro, seq_len):
    frozen = {"method": {"kind": "lora"}}
    chunked, whole = (found(loss, micro, seq_len, **frozen) for loss in ("liger", "hf"))
    assert chunked.train_allocated_peak_bytes <= whole.train_allocated_peak_bytes


def test_a_family_that_liger_does_not_know_is_refused():
    with pytest.raises(SpecError, match=r"liger.*gpt_neox"):
        found("liger", model="EleutherAI/pythia-160m")


@pytest.mark.parametrize("trained", [True, False])
def test_under_autocast_a_chunk_takes_copies_of_the_weight(trained):
    tape = Tape()
    ctx = BlockContext(tape, Dtype.FP32, "cuda", "sdpa", autocast=Dtype.BF16)
    weight = Parameter(tape, "lm_head.weight", 10_000, Dtype.FP32, trained)
    _lowered_chunks(ctx, weight, const(300), const(7_000), Dtype.BF16)
    tape.settle()
    # a chunk's input and logits, and the transposed weight's copy beside the one that autocast keeps of a trained one
    assert max(point.total[0] for point in tape.points) == 2 * (300 + 7_000 + 10_000 * (2 if trained else 1))
    assert tape.total[0] == (2 * 10_000 if trained else 0)


def test_under_autocast_it_needs_less_than_whole_logits_in_fp32():
    long = {"precision": "bf16-autocast", "micro": 4, "seq_len": 4096, "method": {"kind": "lora"}}
    assert found("liger", **long).train_allocated_peak_bytes < found("hf", **long).train_allocated_peak_bytes
    with pytest.raises(SpecError, match="under autocast of fp32 weights and ZeRO-3"):
        found("liger", precision="bf16-autocast", zero={"stage": 3})
