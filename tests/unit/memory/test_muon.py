"""Muon's halves of the parameters and what its update makes, beside DeepSpeed's own function."""

from __future__ import annotations

import pytest

from vramplan.facts.devices import resolve_node
from vramplan.facts.dtype import Dtype
from vramplan.facts.resolve import resolve_architecture
from vramplan.memory import labels
from vramplan.memory.estimate import UncoveredError, estimate
from vramplan.memory.from_run import job_from_run
from vramplan.memory.moments import Stretch
from vramplan.memory.muon import MuonSteps, takes_muon, update_bytes
from vramplan.memory.muon_offload import GATHER_BYTES, Muon12Offloaded
from vramplan.memory.parameters import parameter_groups
from vramplan.spec.load import run_from_mapping
from vramplan.spec.trainable import FullMethod


@pytest.mark.parametrize(
    ("name", "shape", "takes"),
    [
        ("model.layers.0.self_attn.q_proj.weight", (8, 4), True),
        ("transformer.wte.weight", (8, 4), True),
        ("model.layers.0.mlp.experts.down_proj", (2, 8, 4), True),
        ("model.embed_tokens.weight", (8, 4), False),
        ("embed_out.weight", (8, 4), False),
        ("model.embed_tokens.lora_embedding_A", (8, 4), False),
        ("lm_head.weight", (8, 4), False),
        ("model.norm.weight", (4,), False),
    ],
)
def test_matrices_are_told_by_shape_and_name(name, shape, takes):
    assert takes_muon(name, shape) is takes


def test_groups_are_matrices_by_size_and_then_the_rest():
    run = run_from_mapping({"model": "HuggingFaceTB/SmolLM2-135M-Instruct"})
    matrices, rest = parameter_groups(resolve_architecture(run), FullMethod(), frozenset(), 1.0, "largest first")
    numels = {name.rpartition("layers.0.")[2]: numel for name, numel in matrices if ".0." in name}
    # by rows, then columns: gate and up (1536 x 576), q and o (576 x 576) after down (576 x 1536), k and v (192 x 576)
    assert list(numels) == [
        "mlp.gate_proj.weight",
        "mlp.up_proj.weight",
        "mlp.down_proj.weight",
        "self_attn.q_proj.weight",
        "self_attn.o_proj.weight",
        "self_attn.k_proj.weight",
        "self_attn.v_proj.weight",
    ]
    assert {name.rpartition(".")[0].rpartition(".")[2] for name, _ in rest} == {
        "embed_tokens",
        "input_layernorm",
        "post_attention_layernorm",
        "norm",
    }


@pytest.mark.parametrize(
    ("shape", "dtype", "device", "elements_of_4_bytes"),
    [
        # a square of 64: X, A, B and three more of it
        ((8, 8), Dtype.FP32, "cpu", 6 * 64),
        # a Gram matrix of 16 elements: seven of those beside X; of longer ones two X and four of them
        ((4, 8), Dtype.FP32, "cpu", 32 + 7 * 16),
        ((2, 32), Dtype.FP32, "cpu", 2 * 64 + 4 * 4),
        # in fp16 half of that, but a bf16 gradient is compared and cast first
        ((8, 8), Dtype.BF16, "cuda", 3 * 64),
        ((3, 4, 8), Dtype.FP32, "cpu", 3 * (32 + 7 * 16)),
        ((2, 512), Dtype.FP16, "cuda", (4 + 4 + 2) * 1024 // 4),
    ],
    ids=str,
)
def test_an_updates_temporaries_are_those_of_the_function(shape, dtype, device, elements_of_4_bytes):
    assert update_bytes(shape, dtype, device) == 4 * elements_of_4_bytes


def test_the_last_update_stays_beside_the_next():
    steps = MuonSteps(((8, 8), (8, 8)), others_numel=100, device="cpu")
    assert steps.state_bytes == 4 * 128 + 8 * 100
    assert steps.highest(first=True) == (4 * 128, 4 * 64 + 4 * 6 * 64)
    assert steps.highest(first=False) == (4 * 128 + 800, 4 * 64 + 4 * 6 * 64)


def on_host(stage):
    return run_from_mapping(
        {
            "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
            "optimizer": "muon",
            "micro_batch_size": 1,
            "grad_accum_steps": 1,
            "activation_checkpointing": "full",
            "zero": {"stage": stage, "offload_optimizer": "cpu", "offload_param": "none", "reduce_scatter": stage < 3},
            "hardware": {"gpu": "h100-80gb", "gpus_per_node": 4},
        }
    )


def test_momenta_lie_on_the_host_and_matrices_are_gathered_by_turns():
    run = on_host(2)
    job = job_from_run(run, resolve_node(run.hardware), resolve_architecture(run))
    walked = Muon12Offloaded(job, 0)
    stretches: list[Stretch] = walked.walk()
    (of_matrices, others) = walked.flat.partitions
    assert walked.resident[labels.HOST_MOMENTS][0] == 4 * of_matrices + 8 * others
    batches = list(walked._batches(0))
    assert [name for batch in batches for name in batch] == [name for name, _ in job.groups[0]]
    assert all(sum(walked.sizes[name] for name in batch) * 8 <= GATHER_BYTES for batch in batches)
    assert walked.resident[labels.MUON_GATHERS][0] == sum(walked.buffers.values()) <= 4 * GATHER_BYTES
    first, second = (each for each in stretches if each.record_phase.endswith("optimizer_step"))
    assert second.end[0] > first.end[0]  # buffers for momenta besides those for gradients alone


def test_offload_is_not_counted_under_zero_3():
    run = on_host(3)
    with pytest.raises(UncoveredError, match="muon under ZeRO-3"):
        estimate(run, resolve_node(run.hardware), resolve_architecture(run))
