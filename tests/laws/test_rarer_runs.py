"""Estimator against simulator in runs that the matrix has no factor for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from vramplan.facts.devices import resolve_node
from vramplan.facts.resolve import resolve_architecture
from vramplan.memory.estimate import estimate
from vramplan.simulate.asked import request_on
from vramplan.simulate.request import simulate_jobs
from vramplan.spec.run import RunSpec

from support.matrix import Case, beyond_the_bar

Runs = tuple[tuple[str, Mapping[str, Any]], ...]
"""In the words of ``Case.key``, and what is changed."""
MUON = {"optimizer": {"kind": "muon"}}
MUON_3 = {**MUON, "zero": {"reduce_scatter": False}}
BY_LAYER = {"retain": {"layer_lr_decay": 0.9}}
UNDER_MUON: Runs = (
    ("llama.13/full/0/none/sdpa/bf16/none/cuda/4/2/1/adamw/none/small/let go", {**MUON, **BY_LAYER}),
    ("gpt2.0/full/1/none/sdpa/bf16/none/cuda/4/2/2/adamw/none/small/let go", MUON),
    ("qwen3_moe.24/full/1/none/sdpa/fp32/none/cpu/4/2/1/adamw/none/small/let go", MUON),
    ("mistral.15/lora/1/none/sdpa/bf16/none/cuda/4/2/1/adamw/none/small/let go", MUON),
    ("llama.13/full/2/none/sdpa/bf16-autocast/none/cuda/4/2/1/adamw/none/small/let go", {**MUON, **BY_LAYER}),
    ("llama.13/full/2/full/sdpa/fp16/none/cuda/1/2/2/adamw/none/small/let go", MUON),
    ("llama.13/full/3/none/sdpa/bf16/none/cuda/4/2/2/adamw/none/small/let go", MUON_3),
    ("llama.13/full/3/none/sdpa/bf16/none/cuda/4/2/2/adamw/none/small/let go", {**MUON_3, **BY_LAYER}),
    ("qwen2.18/full/3/none/sdpa/fp16/none/cuda/1/2/1/adamw/none/small/let go", MUON_3),
    ("mistral.15/lora/3/none/sdpa/bf16/none/cuda/4/2/1/adamw/none/small/let go", MUON_3),
)
"""Every stage, formats that gradients have, adapters, experts, accumulation, rates by layer."""

MUON_ON_HOST: Runs = (
    ("llama.13/full/2/none/sdpa/bf16/none/cuda/4/2/1/adamw/optimizer/small/let go", MUON),
    ("llama.13/full/1/none/sdpa/bf16/none/cuda/4/2/2/adamw/optimizer/small/let go", MUON),
    ("gpt2.0/full/2/full/sdpa/bf16/none/cuda/4/2/2/adamw/optimizer/small/let go", MUON),
    ("mistral.15/lora/2/none/sdpa/bf16/none/cuda/4/2/1/adamw/optimizer/small/let go", MUON),
    ("qwen2.18/full/2/none/sdpa/fp16/none/cuda/1/2/1/adamw/optimizer/small/let go", MUON),
    ("qwen3_moe.24/full/1/none/sdpa/fp32/none/cuda/4/2/1/adamw/optimizer/small/let go", MUON),
    ("llama.13/full/2/none/sdpa/bf16-autocast/none/cuda/4/2/2/adamw/optimizer/small/let go", MUON),
)
"""The same with states in the host's memory: whole gradients and momenta come to the device by turns."""

DORA = {"use_dora": True}
QDORA = {"method": {**DORA, "r": 8}}
ON_TABLE = {"method": {**DORA, "target_modules": ("q_proj", "embed_tokens")}}
WITH_ADAPTERS: Runs = (
    ("llama.13/qlora/2/none/sdpa/bf16/none/cuda/4/2/1/adamw/none/small/let go", QDORA),
    ("llama.13/qlora/3/full/sdpa/bf16/none/cuda/4/2/2/adamw/none/small/let go", QDORA),
    (
        "gpt_neox.3/qlora/1/none/sdpa/bf16-autocast/none/cuda/4/2/1/adamw/none/small/let go",
        {"method": {**DORA, "dropout": 0.05}},
    ),
    ("llama.13/qlora/0/none/sdpa/fp32/none/cpu/4/2/1/adamw/none/small/let go", QDORA),
    ("llama.13/qlora/3/none/sdpa/fp32/none/cuda/4/2/1/adamw/none/small/let go", {}),
    ("gpt_neox.3/qlora/3/full/sdpa/bf16-autocast/none/cuda/4/2/2/adamw/none/small/let go", {}),
    ("llama.13/lora/2/none/sdpa/bf16-autocast/none/cuda/4/2/1/adamw/none/small/let go", ON_TABLE),
    ("gemma.26/lora/3/none/sdpa/bf16/none/cuda/4/2/2/adamw/none/small/let go", ON_TABLE),
    ("llama.13/lora/3/full/sdpa/bf16/none/cuda/4/2/1/adamw/both/small/let go", ON_TABLE),
)
"""DoRA on 4-bit weights and on tables, 4-bit weights under ZeRO-3 in fp32 and under autocast."""

SAVED = {"method": {"modules_to_save": ("embed_tokens", "lm_head")}}
SAVED_TABLE = {"method": {"modules_to_save": ("embed_tokens",)}}
SAVED_WHOLE: Runs = (
    ("llama.13/lora/2/none/sdpa/bf16/none/cuda/4/2/1/adamw/none/small/let go", SAVED),
    ("llama.14/lora/1/full/sdpa/bf16/none/cuda/4/2/2/adamw/none/small/let go", SAVED),
    ("gemma.26/lora/0/none/sdpa/bf16-autocast/none/cuda/4/2/1/adamw/none/small/let go", SAVED_TABLE),
    ("qwen2.18/lora/3/none/sdpa/fp32/none/cuda/4/2/2/adamw/none/small/let go", SAVED),
    ("llama.13/qlora/2/full/sdpa/bf16/none/cuda/4/2/1/adamw/none/small/let go", SAVED_TABLE),
    (
        "gpt_neox.3/lora/2/full/sdpa/bf16/none/cuda/4/2/1/adamw_torch/none/small/kept",
        {"method": {"modules_to_save": ("embed_in", "lm_head")}},
    ),
    ("llama.14/lora/3/full/sdpa/bf16-autocast/none/cuda/4/2/1/adamw/none/small/let go", SAVED_TABLE),
    (
        "phi.31/lora/2/none/sdpa/fp16/none/cuda/4/2/1/adamw/optimizer/small/let go",
        {"method": {"modules_to_save": ("lm_head",)}},
    ),
)
"""Token tables and heads that are trained whole beside adapters, one matrix or two."""

SPLIT = {"layout": {"dp": 2, "tp": 2}}
TENSOR_PARALLEL: Runs = tuple(
    (f"{model}/full/2/none/sdpa/bf16/none/cuda/4/2/1/adamw/none/small/let go", SPLIT)
    for model in ("gemma.26", "gemma2.27", "gemma2.28", "gpt_neox.3", "gpt_neox.4", "opt.5", "opt.6", "qwen2_moe.20")
)
"""Families whose head is tied and cut all the same, or that have no plan or routed experts."""

AGAIN = {"checkpoint_reentrant": True}
REENTRANT: Runs = tuple(
    (key, AGAIN)
    for key in (
        "gpt2.0/full/3/full/sdpa/bf16/none/cpu/4/2/1/adamw/none/small/kept",
        "qwen3_moe.24/full/3/full/sdpa/bf16/none/cuda/4/2/1/adamw/none/small/let go",
        "gemma2.27/lora/3/full/eager/bf16-autocast/none/cuda/4/2/1/adamw/none/small/let go",
        "qwen2.18/qlora/3/full/sdpa/bf16/none/cuda/4/2/2/adamw/none/small/let go",
        "mistral.15/dora/3/full/sdpa/bf16/none/cuda/4/2/1/adamw/none/small/let go",
        "olmo2.38/full/3/full/sdpa/bf16/none/cuda/4/2/1/adamw/both/small/let go",
        "bloom.8/full/2/full/eager/bf16/padded/cuda/4/2/1/adamw/none/small/let go",
        "bloom.8/lora/3/full/eager/bf16/none/cuda/4/2/1/adamw/none/small/let go",
        "falcon.9/full/3/full/sdpa/bf16-autocast/none/cuda/4/2/1/adamw/none/small/let go",
        "falcon.12/full/1/full/eager/fp32/none/cpu/4/1/1/adamw/none/small/kept",
    )
)
"""Under ZeRO-3, where no checkpoint stores what is recomputed, and layers that return more than a state."""

ON_DISK = {"zero": {"offload_optimizer": "nvme", "offload_param": "none", "nvme_path": "/nowhere"}}
WITH_FILES: Runs = (
    ("llama.13/full/3/none/sdpa/bf16/none/cuda/1/2/1/adamw/none/small/let go", ON_DISK),
    (
        "llama.13/full/3/full/sdpa/bf16/none/cuda/4/2/2/adamw/none/small/let go",
        {"zero": {**ON_DISK["zero"], "offload_param": "nvme"}},
    ),
)
"""States, and weights too, in files: of small models most are too small for one."""

BY_ALL_REDUCE = {"zero": {"stage3_use_all_reduce_for_fetch_params": True}}
ACCUMULATING: Runs = (
    (
        "llama.13/full/3/none/sdpa/bf16/none/cuda/4/2/2/adamw/none/default/let go",
        {**BY_ALL_REDUCE, "grad_accum_steps": 3},
    ),
    ("qwen2.18/full/3/none/sdpa/fp32/none/cuda/4/2/2/adamw/none/small/kept", BY_ALL_REDUCE),
    (
        "deepseek_v3.51/full/3/none/eager/bf16/none/cpu/4/2/2/adamw/none/default/let go",
        {"zero": {"stage3_allgather_sequential": True}, "grad_accum_steps": 4},
    ),
)
"""Micro-batches of a first step, of which the first is recorded and the second is the first to gather ahead."""

IN_BLOCKS: Runs = (
    (
        "gemma3_text.29/full/3/none/sdpa/bf16/none/cpu/4/2/1/adamw/none/small/let go",
        {"loss": "chunked", "zero": {"memory_efficient_linear": False}},
    ),
    ("llama.13/full/1/none/sdpa/fp32/none/cpu/1/2/1/adamw/none/small/let go", {"loss": "chunked"}),
)
"""DeepSpeed's chunked loss on the CPU, which takes the logarithm of sums of exponents in fp32."""


LAYERS_WHOLE: Runs = (
    (
        "opt.5x2/full/3/none/sdpa/bf16/none/cuda/4/1/1/adamw/none/small/let go",
        {"zero": {"stage3_module_granularity_threshold": 740_000}},
    ),
    (
        "qwen2.18x2/full/3/full/sdpa/bf16/none/cuda/4/1/2/adamw/none/small/let go",
        {"zero": {"stage3_module_granularity_threshold": 656_000}},
    ),
    (
        "qwen2.18x2/full/3/none/sdpa/bf16-autocast/none/cuda/4/2/1/adamw/both/default/let go",
        {"zero": {"stage3_module_granularity_threshold": 656_000}},
    ),
    (
        "qwen2.18x2/full/3/none/sdpa/bf16/none/cuda/4/2/1/adamw/none/small/let go",
        {"zero": {"stage3_module_granularity_threshold": 1_000}},
    ),
)
"""Decoder layers that ZeRO-3 gathers whole, and a threshold that is below every module's granularity."""

SUMS = {"grad_accum_dtype": "fp32"}
HALVES = {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
HALF_MASTER = {"bf16_master_weights_and_grads": True}
FORMATS: Runs = (
    ("llama.13x2/full/1/none/sdpa/bf16/none/cuda/4/1/2/adamw_torch/none/small/let go", {**SUMS, **BY_LAYER}),
    ("gpt2.0x2/full/1/none/sdpa/bf16/none/cuda/1/1/2/sgd/none/small/let go", SUMS),
    (
        "llama.13x2/full/1/none/sdpa/bf16/none/cuda/4/1/2/adamw/none/small/let go",
        {**SUMS, "layout": {"dp": 2, "sp": 2}},
    ),
    ("qwen2_moe.20x2/full/2/full/sdpa/bf16/none/cuda/4/1/2/adamw/none/small/let go", SUMS),
    ("mistral.15x2/full/2/none/sdpa/bf16/none/cuda/4/1/1/adamw/none/default/let go", {**SUMS, **BY_LAYER}),
    (
        "llama.13x2/full/2/none/sdpa/bf16/none/cuda/4/1/2/adamw/none/small/let go",
        {**SUMS, "layout": {"dp": 2, "sp": 2}},
    ),
    ("llama.13x2/full/2/none/sdpa/bf16/none/cuda/4/1/2/adamw/optimizer/small/let go", SUMS),
    ("llama.13x2/lora/2/full/sdpa/fp16/none/cuda/4/1/1/adamw/none/small/let go", SUMS),
    ("llama.13x2/full/3/none/sdpa/bf16/none/cuda/4/1/2/adamw/both/small/let go", SUMS),
    ("llama.13x2/lora/3/none/sdpa/bf16/none/cuda/4/1/2/adamw/none/small/let go", SUMS),
    ("deepseek_v3.51x2/full/3/none/sdpa/bf16/none/cuda/4/1/1/adamw/none/small/let go", HALVES),
    ("mistral.15x2/lora/3/none/sdpa/bf16/none/cuda/4/1/2/adamw/none/small/let go", HALVES),
    ("llama.13x2/full/2/none/sdpa/bf16/none/cuda/4/1/2/adamw_torch/none/small/let go", {**HALVES, **BY_LAYER}),
    ("llama.13x2/full/1/none/sdpa/bf16/none/cuda/4/1/2/sgd/none/small/let go", HALVES),
    ("llama.13x2/full/2/none/sdpa/bf16/none/cuda/4/1/2/adamw/optimizer/small/let go", HALF_MASTER),
    ("llama.13x2/full/3/none/sdpa/bf16/none/cuda/4/1/2/adamw/optimizer/small/let go", HALVES),
)
"""DeepSpeed's bf16 variants: gradients summed in fp32, master weights and moments in bf16."""


def _run(key: str, changes: Mapping[str, Any]) -> RunSpec:
    fields = Case.parse(key).run().model_dump()
    for name, change in changes.items():
        fields[name] = {**fields[name], **change} if isinstance(change, Mapping) else change
    return RunSpec.model_validate(fields)


@pytest.mark.slow
@pytest.mark.parametrize(
    "runs",
    [
        UNDER_MUON,
        MUON_ON_HOST,
        WITH_ADAPTERS,
        SAVED_WHOLE,
        TENSOR_PARALLEL,
        REENTRANT,
        WITH_FILES,
        ACCUMULATING,
        IN_BLOCKS,
        FORMATS,
        LAYERS_WHOLE,
    ],
    ids=[
        "muon",
        "muon on the host",
        "adapters",
        "saved",
        "tensor parallel",
        "reentrant",
        "files",
        "accumulating",
        "blocks",
        "formats",
        "layers whole",
    ],
)
def test_estimate_and_simulation_agree(runs):
    asked = [_run(*each) for each in runs]
    nodes = [resolve_node(run.hardware) for run in asked]
    requests = [
        request_on(run, node, key=str(index)) for index, (run, node) in enumerate(zip(asked, nodes, strict=True))
    ]
    failed = []
    for key, result in simulate_jobs(requests, parallel=2):
        run, node = asked[int(key)], nodes[int(key)]
        found = estimate(run, node, resolve_architecture(run), rank=0)
        phases = [phase.as_phase_bytes() for phase in result.phases]
        beyond = [result.error] if result.error else beyond_the_bar(found, phases)[:2]
        failed += [f"{runs[int(key)]}: {each}" for each in beyond]
    assert not failed, "\n".join(failed)
