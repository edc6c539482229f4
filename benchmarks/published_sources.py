"""From rows of published GPU memory to specs: one mapping a source, in the open, without exceptions for single rows.

A mapping answers with what is asked of the estimate, or with the reason why the row cannot be compared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vramplan.facts.device import Node
from vramplan.facts.gpu_catalogue import find_device
from vramplan.spec.run import RunSpec

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Asked:
    """A closed run on its node, and which of its figures the row prints."""

    run: RunSpec
    node: Node
    phase: str | None = None
    """The phase whose peak (max) or end (alive) is meant; None: the highest of the steps, the end of the last."""
    times: int = 1
    """Ranks whose figures the row adds up."""
    rank: int | None = None


Mapping = Callable[[Row], Asked | str]

SAME_SIZES = {
    "NousResearch/Llama-2-70b-hf": "meta-llama/Llama-2-70b-hf",
    "mistralai/Mixtral-8x7B-Instruct-v0.1": "mistralai/Mixtral-8x7B-v0.1",
    "meta-llama/Llama-3.1-8B-Instruct": "meta-llama/Llama-3.1-8B",
    "meta-llama/Llama-3.1-70B-Instruct": "meta-llama/Llama-3.1-70B",
    "Qwen/Qwen2.5-1.5B(-Instruct)": "Qwen/Qwen2.5-1.5B",
    "OpenBuddy/openbuddy-zephyr-7b-v14.1": "mistralai/Mistral-7B-v0.1",
    "EleutherAI/pythia-410m-deduped": "EleutherAI/pythia-410m",
}
"""Checkpoints of another name with the sizes of one of the catalogue (OpenBuddy's has some thousand tokens more)."""


def qwen1(hidden: int, layers: int, heads: int, intermediate: int) -> dict[str, Any]:
    """Qwen's first generation comes with code of its own; its sizes are those of a qwen2 model (biases on q, k, v)."""
    return {
        "model_type": "qwen2",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "intermediate_size": intermediate,
        "vocab_size": 151936,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
    }


QWEN1 = {
    "Qwen/Qwen-1_8B-Chat": qwen1(2048, 24, 16, 5504),
    "Qwen/Qwen-7B-Chat": qwen1(4096, 32, 32, 11008),
    "Qwen/Qwen-14B-Chat": qwen1(5120, 40, 40, 13696),
}


def mapped(row: Row) -> Asked | str:
    """What a row asks of the estimate, or why it cannot be compared."""
    mapping = next((each for prefix, each in MAPPINGS if row["source"].startswith(prefix)), None)
    return "no mapping for this source" if mapping is None else mapping(row)


def fms(row: Row) -> Asked | str:
    """TRL's SFTTrainer 0.13 (transformers 4.48) on one A100: packed sequences, checkpointing, torch's AdamW."""
    framework = row["other"].get("framework_config", "none")
    if "foak" in framework or "fast" in framework:
        return f"{framework}: kernels of its own in the place of the model's"
    if row["method"] == "qlora-gptq":
        return "GPTQ weights are not counted"
    if row["method"] != "full" and "Mixtral" in row["model"]:
        return (
            "transformers 4.48 kept every expert's projections as linears; those of 5.17, counted here, are one tensor"
        )
    fields = trainer(row, shifted_logits=True)
    if row["method"] == "full":
        fields["precision"] = "bf16"
    elif row["method"] == "lora":
        fields |= {"precision": "bf16", "method": lora(row, "lora")}
    else:  # baseline: TRL prepares the model and casts embeddings and head back to bf16, but no norms
        prepared = {"fp32_norms": framework.startswith("baseline")}
        fields |= {"precision": "bf16-weights-autocast", "method": lora(row, "qlora") | prepared}
    return asked(row, fields)


def swift(row: Row) -> Asked | str:
    """ms-swift's Trainer (transformers 4.3x), bf16 weights under bf16 autocast."""
    fields = trainer(row, shifted_logits=True, precision="bf16-weights-autocast")
    fields["grad_accum_steps"] = row["other"].get("gradient_accumulation_steps", 1)
    if row["method"] == "lora":
        fields["method"] = lora(row, "lora")
    elif row["method"] != "full":
        return f"method {row['method']} is not counted"
    if "eager" in row["attention"]:
        fields["attention"] = "eager"
    return asked(row, fields)


def llama_factory(row: Row) -> Asked | str:
    """DeepSpeed's see_memory_usage while the engine starts: peaks are since the line before."""
    stage, kind = row["other"]["stage"], row["measured"]["kind"]
    last = "after initializing ZeRO optimizer"
    untouched = ("Stage 3 initialize beginning", "before creating fp16 partitions", "after creating fp16 partitions")
    phases = {**dict.fromkeys(untouched, "model_load"), last: "engine_init"}
    if stage not in phases or (kind == "max_allocated" and stage != last):
        return f"{stage}: a moment inside a phase, which the ledger does not keep apart"
    zero = row["zero"]
    fields = {
        **model(row),
        "seq_len": 1024,  # plays no part in how the engine starts
        "micro_batch_size": 1,
        "grad_accum_steps": 1,
        "activation_checkpointing": "full",
        "optimizer": {"kind": "adamw_torch"},
        "zero": {
            "stage": 3,
            "offload_optimizer": "none",
            "offload_param": "none",
            "reduce_bucket_size": zero["reduce_bucket"],
            "stage3_prefetch_bucket_size": zero["prefetch_bucket"],
            "stage3_param_persistence_threshold": int(zero["param_persistence_threshold"].split()[0]),
        },
    }
    return asked(row, fields, gpu="a100-80gb", phase=phases[stage])


def arctic(row: Row) -> Asked | str:
    """Long sequences on DeepSpeed ZeRO-3 with Ulysses, checkpointing, the optimizer on the host."""
    other, zero = row["other"], row["zero"]
    kernels = "liger" if other["liger"] else "hf"  # its loss, norms and rotary positions, and its MLP unless tiled
    sp = other["sequence_parallel_size"]
    fields = {
        **model(row),
        "seq_len": row["seq_len"],
        "micro_batch_size": row["micro_batch_size"],
        "grad_accum_steps": 1,
        "activation_checkpointing": "full",
        "attention": "flash_attention_2" if row["attention"].startswith("flash") else row["attention"],
        "loss": kernels,
        "kernels": kernels,
        "tiled_mlp": other["tiled_mlp"],
        "offload_activations": "cpu" if other["activation_cpu_offload"] else "none",
        "alloc_conf": "expandable_segments:True",
        "zero": {
            "stage": 3,
            "offload_optimizer": zero.get("offload_optimizer") or "none",
            "offload_param": zero.get("offload_param") or "none",
        },
        "layout": {"dp": row["num_gpus"] // sp, "sp": sp},
    }
    return asked(row, fields)


def encoder(row: Row) -> str:
    """BERT and DistilBERT."""
    return f"{row['model']} is an encoder"


def forward_and_backward(row: Row) -> str:
    """Benchmarks of attention with torch 2.2: that GPT-NeoX had masks as buffers in every layer, and kept more."""
    return "forward and backward of logits.sum(), without a loss or an optimizer, in the code of another transformers"


def context_only(row: Row) -> str:
    """Readings that facts/data/overhead.json cites."""
    return "the device context alone: cited by vramplan/facts/data/overhead.json"


MAPPINGS: tuple[tuple[str, Mapping], ...] = (
    ("foundation-model-stack/fms-acceleration", fms),
    ("modelscope/ms-swift@cdb169b78:docs/source_en/LLM/Benchmark.md", swift),
    ("LLaMA-Factory training log", llama_factory),
    ("snowflakedb/ArcticTraining", arctic),
    ("huggingface/transformers:docs/source/en/model_doc/bert.md", encoder),
    ("huggingface/transformers:docs/source/en/model_doc/distilbert.md", encoder),
    ("huggingface/transformers@0016acf:docs/source/perf_train_gpu_one.mdx", encoder),
    ("huggingface/transformers:docs/source/en/model_doc/gpt_neox.md", forward_and_backward),
    ("stas00/ml-engineering", context_only),
)


def trainer(row: Row, **fields: Any) -> dict[str, Any]:
    """What every run of transformers' Trainer without DeepSpeed has in common."""
    return {
        **model(row),
        "engine": "torch",
        "seq_len": row["seq_len"],
        "micro_batch_size": row["micro_batch_size"],
        "grad_accum_steps": 1,
        "activation_checkpointing": "full" if row["activation_checkpointing"] else "none",
        "attention": "flash_attention_2" if row["attention"].startswith("flash") else "sdpa",
        "optimizer": {"kind": "adamw_torch"},
        "zero": {"stage": 0, "offload_optimizer": "none", "offload_param": "none"},
        **fields,
    }


def model(row: Row) -> dict[str, Any]:
    """The model of a row: its name in the catalogue, or its fields."""
    if row["model"] in QWEN1:
        return {"model": row["model"], "model_config_fields": QWEN1[row["model"]]}
    return {"model": SAME_SIZES.get(row["model"], row["model"])}


def lora(row: Row, kind: str) -> dict[str, Any]:
    """A row's adapters."""
    other = row["other"]
    names = other["target_modules"].replace("(DEFAULT)", "").replace(",", " ").split()
    own = {"c_attn": ("q_proj", "k_proj", "v_proj")} if row["model"] in QWEN1 else {}
    targets = tuple(name for each in names for name in own.get(each, (each,)))
    everything = other["target_modules"].startswith("all")
    dropout = str(other.get("lora_dropout", 0)).split()[0]
    return {
        "kind": kind,
        "r": other["lora_r"],
        "alpha": other.get("lora_alpha"),
        "dropout": float(dropout),
        "target_modules": "all-linear" if everything else targets,
    }


def asked(row: Row, fields: dict[str, Any], gpu: str | None = None, phase: str | None = None) -> Asked:
    """The run of a row on its GPUs."""
    total = bool(row["other"].get("total_over_gpus"))
    node = Node(find_device(gpu or row["gpu"]), row["num_gpus"])
    return Asked(RunSpec.model_validate(fields), node, phase, times=row["num_gpus"] if total else 1)
