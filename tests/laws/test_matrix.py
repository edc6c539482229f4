"""Estimator against simulator: within 1% at the peak and 2% at every phase's peak and end.

The pairwise covers and the whole matrix are ``benchmarks/matrix.py``, which writes a table of what is beyond the bar.
"""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from vramplan.facts.resolve import resolve_architecture
from vramplan.memory.estimate import COVERED_FAMILIES
from vramplan.simulate.request import simulate_jobs
from vramplan.spec.run import RunSpec

from support.matrix import Case, Prepared, beyond_the_bar, cover_in_turns, covered_models, known_reason, prepare

QUICK = (
    "gpt2.0/full/3/none/sdpa/bf16/none/cuda/4/2/1/adamw/none/small/let go",
    "stablelm.35/full/1/full/sdpa/bf16/packed/cuda/4/2/2/adamw/none/small/let go",
    "mistral.15/full/2/none/flash_attention_2/bf16/padded/cuda/4/2/1/adamw/none/small/let go",
    "llama.13/full/2/none/sdpa/bf16-autocast/none/cuda/4/2/1/adamw/none/small/let go",
    "gemma2.27/lora/2/none/eager/bf16-autocast/none/cuda/4/2/1/adamw/none/small/let go",
    "gemma2.27/frozen/0/full/eager/fp32/none/cuda/4/1/2/adamw/none/small/let go",
    "phi3.33/full/2/none/sdpa/bf16/none/cuda/4/1/1/adamw/none/small/let go",
    "llama.13/full/1/full/sdpa/bf16/none/cuda/4/2/2/adamw_torch/none/small/let go",
    "qwen2.18/qlora/2/none/sdpa/bf16-autocast/none/cuda/4/2/1/adamw/none/small/let go",
    "falcon.9/qlora/0/full/flash_attention_2/bf16/none/cuda/4/2/1/adamw/none/small/let go",
    "llama.13x2/qlora/2/full/sdpa/bf16-autocast/none/cpu/1/2/1/adamw_torch/none/default/kept",
    "qwen2_moe.20/lora/3/none/sdpa/fp16/none/cuda/4/2/1/adamw/none/small/let go",
    "phi3.34/frozen/3/none/sdpa/bf16-autocast/padded/cuda/4/2/2/adamw_torch/optimizer/small/let go",
    "mistral.16/expanded/1/full/sdpa/fp32/none/cuda/4/1/2/adamw_torch/optimizer/small/kept",
    "stablelm.36/full/3/none/sdpa/bf16-autocast/padded/cuda/1/2/1/adamw/none/small/kept",
    "starcoder2.47x2/dora/3/none/sdpa/fp32/none/cpu/1/1/1/adamw_torch/both/small/kept",
    "gemma3_text.29x2/dora/3/full/eager/bf16-autocast/padded/cuda/4/2/2/adamw_torch/optimizer/small/let go",
    "gpt2.0x2/frozen/3/none/eager/bf16-autocast/none/cuda/4/2/1/adamw_torch/both/small/kept",
    "falcon.9x2/frozen/2/none/flash_attention_2/bf16-autocast/packed/cuda/1/1/2/adamw_torch/optimizer/small/let go",
    "gemma3_text.29x2/qlora/1/full/eager/bf16-autocast/none/cuda/4/2/1/adamw/optimizer/small/let go",
    "llama4_text.54x2/full/3/full/sdpa/bf16-autocast/padded/cuda/4/1/2/adamw_torch/both/small/let go",
    "gpt_oss.53x2/lora/1/none/eager/bf16/none/cpu/1/2/1/sgd/none/default/let go",
    "mixtral.17x2/full/2/full/sdpa/bf16-autocast/none/cuda/4/1/2/adamw_torch/none/small/kept",
    "deepseek_v2.49x2/expanded/2/none/flash_attention_2/bf16-autocast/padded/cuda/1/1/1/adamw/optimizer/small/kept",
    "gpt2.0x2/lora/0/full/eager/bf16-autocast/packed/cuda/1/1/1/adamw_torch/none/small/let go",
    "qwen3_moe.24x2/qlora/3/none/flash_attention_2/bf16-autocast/padded/cuda/4/2/1/adamw/both/small/let go",
    "gemma3_text.29/full/2/none/sdpa/bf16-autocast/padded/cuda/4/1/2/adamw_torch/optimizer/small/kept",
    "deepseek_v2.49x2/frozen/3/none/flash_attention_2/bf16-autocast/padded/cuda/1/1/1/adamw/none/small/let go",
    "gpt2.0x2/expanded/3/none/flash_attention_2/bf16-autocast/packed/cuda/4/1/1/adamw/none/small/let go",
    "gpt2.0x2/frozen/2/full/eager/bf16-autocast/none/cpu/4/1/1/adamw_torch/none/small/let go",
    "deepseek_v2.49x2/lora/3/full/flash_attention_2/fp16/packed/cuda/4/2/1/adamw_torch/both/small/let go",
)
"""All stages, methods that freeze, masks, kernels and precisions (the words of ``Case.key``)."""


def _beyond(cases: Iterable[Case]) -> list[str]:
    """What differs by more than it may without a known reason, or was not simulated."""
    prepared = {}
    for case in cases:
        found = prepare(case)
        assert isinstance(found, Prepared), found
        prepared[case.key] = found
    failed = []
    for key, result in simulate_jobs((each.request() for each in prepared.values()), parallel=2):
        phases = [phase.as_phase_bytes() for phase in result.phases]
        beyond = [result.error] if result.error else beyond_the_bar(prepared[key].estimate, phases)
        failed += [f"{key}: {each}" for each in beyond[:2] if not known_reason(prepared[key].case)]
    return failed


def test_estimate_and_simulation_agree():
    failed = _beyond(map(Case.parse, QUICK))
    assert not failed, "\n".join(failed)


def test_the_matrix_has_every_family_that_is_covered():
    families = {resolve_architecture(_run_of(model)).family for model in covered_models()}
    assert families == COVERED_FAMILIES


def _run_of(model: str) -> RunSpec:
    return Case.parse(f"{model}/full/0/none/sdpa/bf16/none/cpu/1/1/1/adamw/none/small/kept").run()


def test_weights_in_4_bits_are_on_the_gpu_before_there_are_adapters():
    """As transformers loads them (``update_device_map``), not moved there by the engine."""
    found = prepare(Case.parse("llama.13/qlora/3/none/sdpa/bf16/none/cuda/4/1/1/adamw/both/small/let go"))
    assert isinstance(found, Prepared), found
    ((_, result),) = simulate_jobs([found.request()])
    assert not result.error
    loaded, estimated = result.phases[0], found.estimate.phases[0]
    assert loaded.end_bytes == pytest.approx(estimated.end_bytes, rel=0.001)
    assert not beyond_the_bar(found.estimate, [phase.as_phase_bytes() for phase in result.phases])


@pytest.mark.slow
def test_a_pairwise_cover_agrees():
    failed = _beyond(cover_in_turns())
    assert not failed, "\n".join(failed)
