"""Autocast on a GPU that is not there: the simulator's casts against the estimator's, which share no code."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vramplan.facts.devices import resolve_node
from vramplan.facts.resolve import resolve_architecture
from vramplan.memory.estimate import estimate
from vramplan.simulate.cuda_autocast import CudaAutocast
from vramplan.simulate.request import Conditions, SimulationRequest, simulate_jobs
from vramplan.spec.layout import Layout
from vramplan.spec.load import run_from_mapping

CONFIG = {
    "model_type": "qwen2",  # biases beside RMS norms
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 3000,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
LORA = {"kind": "lora", "r": 8}


def asked(stage, method="full", checkpointing="none"):
    return run_from_mapping(
        {
            "model": "tiny",
            "model_config_fields": CONFIG,
            "method": method,
            "seq_len": 256,
            "micro_batch_size": 2,
            "grad_accum_steps": 1,
            "precision": "bf16-autocast",
            "activation_checkpointing": checkpointing,
            "hardware": {"gpu": "rtx4090", "gpus_per_node": 4},
            "layout": Layout(dp=4),
            "zero": {"stage": stage, "reduce_bucket_size": 1_000_000, "stage3_prefetch_bucket_size": 200_000},
        }
    )


@pytest.mark.slow
def test_both_witnesses_cast_alike():
    runs = {
        "zero0": asked(0),
        "zero2 checkpointing": asked(2, checkpointing="full"),
        "zero3": asked(3),
        "zero3 checkpointing": asked(3, checkpointing="full"),
        "zero3 adapters": asked(3, LORA),
    }
    conditions = Conditions(padded=False)
    requests = [SimulationRequest(run, "cuda", conditions=conditions, key=key) for key, run in runs.items()]
    for key, found in simulate_jobs(requests):
        assert found.error is None, key
        run = runs[key]
        estimated = {phase.phase: phase for phase in _estimate(run).phases}
        for phase in found.phases:
            if phase.is_step:
                assert estimated[phase.phase].peak_bytes == pytest.approx(phase.peak_bytes, rel=0.02), (
                    key,
                    phase.phase,
                )
        highest = max(phase.peak_bytes for name, phase in estimated.items() if name.startswith("step"))
        assert highest == pytest.approx(found.train_allocated_peak_bytes, rel=0.01), key


def _estimate(run):
    return estimate(run, resolve_node(run.hardware), resolve_architecture(run))


class Copies(TorchDispatchMode):
    """Shapes of what is cast, in the order in which it is."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default:
            self.shapes.append(tuple(args[0].shape))
        return func(*args, **(kwargs or {}))


def test_operands_are_cast_in_the_order_of_torchs_own_kernels():
    bias, x, weight = torch.randn(5), torch.randn(2, 3), torch.randn(3, 5)
    calls = [
        (torch.addmm, (bias, x, weight)),
        (torch.matmul, (x, weight)),
        (torch.nn.functional.linear, (x, weight.T.contiguous(), bias)),
        (torch.baddbmm, (torch.randn(1, 2, 5), x[None], weight[None])),
    ]
    ours = CudaAutocast("cpu")
    for function, operands in calls:
        with torch.autocast("cpu", torch.bfloat16), Copies() as torchs:
            function(*operands)
        with torch.autocast("cpu", torch.bfloat16), Copies() as copies:
            ours.lowered(function)(*operands)
        assert copies.shapes == torchs.shapes == [tuple(each.shape) for each in reversed(operands)]
