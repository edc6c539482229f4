"""Every rule: a run that it refuses, and the nearest one that it lets pass."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest

from vramplan.facts.device import Device, Node
from vramplan.facts.devices import find_device
from vramplan.facts.resolve import resolve_architecture
from vramplan.search.legality import _RULES, illegalities, illegality
from vramplan.search.space import candidates
from vramplan.spec.load import merge, run_from_mapping
from vramplan.spec.run import RunSpec

from support.small_configs import SIZES

NODE = Node(find_device("h100-80gb"), 8)
CPU_NODE = Node(Device("CPU", "cpu", 2**34, 2**33), 8)
BASE = {
    "model": "meta-llama/Llama-3.1-8B",
    "micro_batch_size": 1,
    "grad_accum_steps": 1,
    "activation_checkpointing": "none",
    "zero": {"stage": 2, "offload_optimizer": "none", "offload_param": "none"},
    "layout": {"dp": 8},
}


def ask(fields: dict[str, object]) -> RunSpec:
    return run_from_mapping(merge(BASE, fields))


def reasons(fields: dict[str, object], node: Node = NODE) -> list[str]:
    run = ask(fields)
    return [each.reason for each in illegalities(run, node, resolve_architecture(run))]


FALCON_RW = {
    "model_type": "falcon",
    "hidden_size": 2048,
    "num_attention_heads": 32,
    "num_hidden_layers": 24,
    "vocab_size": 50304,
    "alibi": True,
    "multi_query": False,
    "parallel_attn": False,
    "bias": True,
    "new_decoder_architecture": False,
}
"""As of falcon-rw-1b."""
LLAMA = {"model_type": "llama", **SIZES}


def packed(method: str, flag: str = "load_in_4bit") -> dict[str, object]:
    flags = {flag: True} if method == "bitsandbytes" else {}
    return {"model_config_fields": {**LLAMA, "quantization_config": {"quant_method": method, **flags}}}


HALVES = {"bf16_master_weights_and_grads": True}
REFUSED = [
    (packed("gptq"), NODE, "is stored packed (gptq), which is not trained: name the model that it was made of"),
    (packed("bitsandbytes"), NODE, "set method qlora, or name the model it is made of"),
    ({"method": "qlora", **packed("bitsandbytes", "load_in_8bit")}, NODE, "is stored packed (bitsandbytes, 8 bits)"),
    ({"method": "qlora", **packed("fp8")}, NODE, "is stored in fp8, which is not packed anew: name a copy"),
    ({"zero": {"offload_param": "cpu"}}, NODE, "offload_param needs ZeRO stage 3"),
    ({"zero": {"stage": 0, "offload_optimizer": "cpu"}}, NODE, "offload_optimizer needs ZeRO stage 1"),
    ({"zero": {"offload_param": "nvme"}}, NODE, "offload_param needs ZeRO stage 3"),
    ({"zero": {"offload_optimizer": "nvme"}}, NODE, "offload_optimizer nvme needs ZeRO stage 3"),
    ({"optimizer": {"kind": "muon"}, "zero": {"stage": 3}}, NODE, "needs zero.reduce_scatter false"),
    (
        {"method": "lora", "zero": {"stage": 3, "stage3_use_all_reduce_for_fetch_params": True}},
        NODE,
        "tensors of one format together",
    ),
    ({"grad_accum_dtype": "fp32", "zero": {"stage": 0}}, NODE, "grad_accum_dtype fp32 beside bf16 weights needs ZeRO"),
    ({**HALVES, "bf16_optimizer_states": True, "zero": {"stage": 0}}, NODE, "stage 0 keeps fp32 master weights"),
    (HALVES, NODE, "set bf16_optimizer_states true, or offload"),
    ({**HALVES, "zero": {"offload_optimizer": "cpu"}, "optimizer": "adamw_torch"}, NODE, "set optimizer adamw"),
    (
        {"zero": {"stage": 3, "stage3_module_granularity_threshold": 10_000_000}},
        NODE,
        "threshold 10000000 takes other modules whole than decoder layers",
    ),
    ({"zero": {"hpz_partition_size": 4}}, NODE, "hpz_partition_size needs ZeRO stage 3"),
    ({"zero": {"stage": 3, "hpz_partition_size": 3}}, NODE, "3 does not divide the 8 ranks"),
    ({"precision": "fp16"}, CPU_NODE, "precision fp16 needs a CPU"),
    ({"precision": "fp16"}, Node(find_device("P100"), 8), "compute capability 7.0"),
    ({"attention": "flash_attention_2"}, CPU_NODE, "does not run on CPU"),
    ({"attention": "flash_attention_2"}, Node(find_device("T4"), 8), "compute capability 8.0"),
    ({"attention": "flash_attention_2", "precision": "fp32"}, NODE, "bf16 or fp16 only"),
    ({"model": "openai/gpt-oss-20b"}, NODE, "set attention eager"),
    ({"model": "bigscience/bloom-560m", "attention": "sdpa"}, NODE, "does not exist for the bloom family"),
    ({"model_config_fields": FALCON_RW, "attention": "flash_attention_2"}, NODE, "no place for falcon's ALiBi"),
    ({"model_config_fields": FALCON_RW, "data": {"packing": "best_fit"}}, NODE, "other: set data.packing none"),
    ({"model": "facebook/opt-125m", "data": {"packing": "best_fit"}}, NODE, "opt makes its masks without positions"),
    (
        {"model": "openai/gpt-oss-20b", "attention": "eager", "data": {"packing": "best_fit"}},
        NODE,
        "gpt_oss makes its masks without positions",
    ),
    ({"layout": {"dp": 4, "sp": 2}, "data": {"packing": "best_fit"}}, NODE, "set attention flash_attention_2"),
    ({"model": "meta-llama/Llama-4-Scout-17B-16E-Instruct", "method": "lora"}, NODE, "llama4's routers"),
    ({"method": {"kind": "qlora", "use_dora": True}, "zero": {"stage": 3}}, CPU_NODE, "does not know"),
    ({"loss": "liger"}, CPU_NODE, "needs a GPU"),
    ({"kernels": "liger"}, CPU_NODE, "kernels liger are Triton's"),
    ({"offload_activations": "cpu", "activation_checkpointing": "none"}, NODE, "set activation_checkpointing full"),
    ({"layout": {"dp": 4, "pp": 2}}, NODE, "PipelineModule"),
    ({"layout": {"dp": 1, "sp": 3}, "seq_len": 3072}, NODE, "does not divide the 32 attention heads"),
    ({"layout": {"dp": 4, "sp": 2}, "attention": "eager"}, NODE, "layout.sp needs attention sdpa"),
    ({"layout": {"dp": 4, "sp": 2}, "model": "openai-community/gpt2"}, NODE, "num_key_value_heads"),
    ({"layout": {"dp": 4, "sp": 2}, "model": "deepseek-ai/DeepSeek-V2-Lite"}, NODE, "latent attention"),
    ({"layout": {"dp": 4, "sp": 2}, "model": "google/gemma-2-9b", "seq_len": 8192}, NODE, "windows of 4096 tokens"),
    ({"layout": {"dp": 4, "sp": 2}, "retain": {"ewc": {"data": "builtin:arithmetic"}}}, NODE, "retain.ewc"),
    ({"layout": {"dp": 4, "sp": 2}, "seq_len": 2049}, NODE, "no multiple of layout.sp 2"),
    ({"layout": {"dp": 2, "sp": 2, "tp": 2}}, NODE, "layout.tp and layout.sp together"),
    ({"layout": {"dp": 4, "tp": 2}, "method": "lora"}, NODE, "layout.tp splits linears"),
    ({"layout": {"dp": 4, "tp": 2}, "model": "mistralai/Mixtral-8x7B-v0.1"}, NODE, "rejects the plan"),
    ({"layout": {"dp": 4, "tp": 2}, "model": "openai-community/gpt2"}, NODE, "no plan for gpt2"),
    (
        {"method": "lora", "zero": {"stage": 3, "offload_optimizer": "nvme", "offload_param": "nvme"}},
        NODE,
        "more of them ahead than",
    ),
]


@pytest.mark.parametrize(("fields", "node", "said"), REFUSED, ids=str)
def test_a_refused_combination_gives_its_reason(fields, node, said):
    assert any(said in reason for reason in reasons(fields, node)), reasons(fields, node)


@pytest.mark.parametrize(
    ("fields", "node"),
    [
        ({}, NODE),
        ({"zero": {"stage": 3, "offload_param": "cpu"}}, NODE),
        ({"zero": {"stage": 1, "offload_optimizer": "cpu"}}, NODE),
        ({"zero": {"stage": 3, "hpz_partition_size": 4}}, NODE),
        ({"precision": "fp16"}, NODE),
        ({"attention": "flash_attention_2", "precision": "bf16-autocast"}, NODE),
        ({"loss": "liger"}, NODE),
        ({"layout": {"dp": 2, "sp": 4}}, NODE),
        ({"layout": {"dp": 4, "tp": 2}}, NODE),
        ({"precision": "bf16"}, CPU_NODE),
        (packed("mxfp4"), NODE),
        ({"zero": {"stage": 3, "stage3_module_granularity_threshold": 1000}}, NODE),
        ({"zero": {"stage": 3, "stage3_module_granularity_threshold": 20_000_000}}, NODE),  # its layers
        ({"grad_accum_dtype": "fp32", "zero": {"stage": 1}}, NODE),
        ({"grad_accum_dtype": "fp32", "precision": "bf16-autocast", "zero": {"stage": 0}}, NODE),
        ({**HALVES, "bf16_optimizer_states": True}, NODE),
        ({**HALVES, "zero": {"offload_optimizer": "cpu"}}, NODE),
        ({"method": "qlora", **packed("bitsandbytes")}, NODE),
    ],
    ids=str,
)
def test_an_allowed_combination_is_not_refused(fields, node):
    assert reasons(fields, node) == []


def test_key_value_heads_may_be_fewer_than_sequence_parallel_ranks():
    # 8 key/value heads: 16 ranks are a multiple of them, so DeepSpeed replicates heads
    run = ask({"layout": {"dp": 1, "sp": 16}})
    node = replace(NODE, num_nodes=2)
    assert illegality(run, node, resolve_architecture(run)) is None


def test_every_rule_is_seen_refusing():
    hit = set()
    for fields, node, _ in REFUSED:
        run = ask(fields)
        hit |= {each.source for each in illegalities(run, node, resolve_architecture(run))}
    assert hit == {source for _, source in _RULES}


def test_every_source_names_a_file_and_a_symbol_that_the_installed_packages_have():
    for _, source in _RULES:
        file, _, symbol = source.split(";")[0].partition(", ")
        package, _, rest = file.partition("/")
        found = find_spec(package)
        if found is None or found.origin is None:
            continue  # liger_kernel is an option; the others are the trainer's own requirements
        path = Path(found.origin).parent / rest.split(" ")[0]
        assert path.exists(), source
        assert all(part in path.read_text() for part in symbol.split(" ")[0].split(".")), source


def test_what_a_search_tries_by_itself_is_legal_on_a_gpu():
    run = run_from_mapping({"model": "meta-llama/Llama-3.1-8B"})
    architecture = resolve_architecture(run)
    for candidate in candidates(run, NODE):
        assert illegality(candidate.close(run, NODE), NODE, architecture) is None
