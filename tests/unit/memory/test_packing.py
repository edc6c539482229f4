"""Loading with QLoRA: weights are packed into 4 bits one after the other, by a kernel that holds several copies."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from vramplan.memory.quantized import BLOCK, nf4_bytes, quantizing_bytes
from vramplan.simulate.request import simulate_jobs

from support.matrix import Case, Prepared, prepare

MEASURED = (
    "llama.13x2/qlora/2/full/sdpa/bf16-autocast/none/cpu/1/2/1/adamw_torch/none/default/kept",
    "gemma2.27x2/qlora/1/full/sdpa/bf16/none/cpu/1/2/1/adamw_torch/none/default/kept",
)
"""On the CPU and with the outputs kept, as measured runs are, which build every weight before they pack the first."""


def test_loading_of_a_measured_run_agrees_with_its_simulation():
    prepared = {key: prepare(Case.parse(key)) for key in MEASURED}
    assert all(isinstance(each, Prepared) for each in prepared.values())
    for key, result in simulate_jobs((each.request() for each in prepared.values()), parallel=2):
        phase, simulated = prepared[key].estimate.phases[0], result.phases[0]
        assert phase.phase == simulated.phase == "model_load"
        assert phase.peak_bytes == pytest.approx(simulated.peak_bytes, rel=1e-3)
        assert phase.end_bytes == pytest.approx(simulated.end_bytes, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_of_the_cpu_holds_what_the_profiler_sees(dtype: torch.dtype):
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(1024, 1024).to(dtype)
    functional.quantize_4bit(weight, blocksize=BLOCK, compress_statistics=True, quant_type="nf4")  # makes its tables
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        kept = functional.quantize_4bit(weight, blocksize=BLOCK, compress_statistics=True, quant_type="nf4")
    now = most = 0
    for event in found.profiler.kineto_results.events():
        now += event.nbytes() if event.name() == "[memory]" else 0
        most = max(most, now)
    assert most == pytest.approx(quantizing_bytes(weight.numel(), weight.element_size()), rel=1e-3)
    assert now <= nf4_bytes(weight.numel()) + 4096
    assert kept
