"""Small models traced in full and followed from fewer layers: ``python depth_cases.py DP CASE...``, a line a case."""

from __future__ import annotations

import json
import sys

LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 80,
    "vocab_size": 320,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
GEMMA = {**LLAMA, "model_type": "gemma2", "head_dim": 8, "sliding_window": 16}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "moe_intermediate_size": 24, "num_experts_per_tok": 2}
MIXTRAL = {**LLAMA, **EXPERTS, "model_type": "mixtral"}
QWEN3_MOE = {**LLAMA, **EXPERTS, "model_type": "qwen3_moe", "head_dim": 8}
QWEN2_MOE = {**LLAMA, **EXPERTS, "model_type": "qwen2_moe", "shared_expert_intermediate_size": 40}
GPT_OSS = {**LLAMA, **EXPERTS, "model_type": "gpt_oss", "head_dim": 8, "sliding_window": 16}
DEEPSEEK = {
    **LLAMA,
    "model_type": "deepseek_v3",
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 3,
    "n_group": 2,
    "topk_group": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
}
LLAMA4 = {
    **LLAMA,
    **EXPERTS,
    "model_type": "llama4_text",
    "head_dim": 8,
    "intermediate_size_mlp": 72,
    "interleave_moe_layer_step": 2,
    "attention_chunk_size": 16,
}
SMALL_BUCKETS = {
    "reduce_bucket_size": 2000,
    "stage3_prefetch_bucket_size": 4000,
    "stage3_max_live_parameters": 9000,
    "stage3_max_reuse_distance": 9000,
    "stage3_param_persistence_threshold": 100,
    "sub_group_size": 1000,
}

CHECKPOINTED = {"activation_checkpointing": "full"}
CASES = {
    1: {
        "zero 2, checkpointing": {"zero": {"stage": 2}, **CHECKPOINTED},
    },
    2: {
        "zero 3, checkpointing, small buckets": {"zero": {"stage": 3, **SMALL_BUCKETS}, **CHECKPOINTED},
        "zero 3, mixtral": {"fields": MIXTRAL, "zero": {"stage": 3, "stage3_max_reuse_distance": 9_000}},
    },
}
"""By ranks, since a process plays one world size in its life."""
MORE_CASES = {
    1: {
        "zero 0": {},
        "zero 0, checkpointing, lora": {**CHECKPOINTED, "method": {"kind": "lora"}},
        "zero 1": {"zero": {"stage": 1}},
        "zero 1, fp32": {"zero": {"stage": 1}, "precision": "fp32"},
        "zero 0, sliding and full attention": {"fields": GEMMA},
        "zero 3, lora": {"zero": {"stage": 3}, "method": {"kind": "lora"}},
    },
    2: {
        "zero 1, two partitions": {"zero": {"stage": 1}},
        "zero 2, two partitions, two micro-batches": {"zero": {"stage": 2}, "grad_accum_steps": 2},
        "zero 3, lora, checkpointing": {"zero": {"stage": 3}, "method": {"kind": "lora"}, **CHECKPOINTED},
        "zero 3, optimizer offloaded": {"zero": {"stage": 3, "offload_optimizer": "cpu"}},
        "zero 3, reuse over layers": {"zero": {"stage": 3, "stage3_max_reuse_distance": 90_000}, **CHECKPOINTED},
        "zero 3, mixtral, small buckets, checkpointing": {
            "fields": MIXTRAL,
            "zero": {"stage": 3, **SMALL_BUCKETS},
            **CHECKPOINTED,
        },
        "zero 3, qwen3_moe": {
            "fields": QWEN3_MOE,
            "zero": {"stage": 3, "stage3_max_reuse_distance": 30_000},
            **CHECKPOINTED,
        },
        "zero 3, qwen2_moe, lora": {"fields": QWEN2_MOE, "zero": {"stage": 3}, "method": {"kind": "lora"}},
        "zero 2, gpt_oss": {"fields": GPT_OSS, "attention": "eager", "zero": {"stage": 2}},
        "zero 3, gpt_oss, checkpointing": {
            "fields": GPT_OSS,
            "attention": "eager",
            "zero": {"stage": 3},
            **CHECKPOINTED,
        },
        "zero 3, deepseek_v3, dense before": {
            "fields": DEEPSEEK,
            "zero": {"stage": 3, "stage3_max_reuse_distance": 60_000},
            **CHECKPOINTED,
        },
        "zero 3, llama4, dense between": {"fields": LLAMA4, "zero": {"stage": 3}, **CHECKPOINTED},
    },
}
MORE_PERIODS = 3
"""How many periods the depth that is followed has more than the first that is traced."""


def run_of(case, dp, num_layers):
    from vramplan.spec.load import run_from_mapping

    zero = {"stage": 0, "offload_optimizer": "none", "offload_param": "none", **case.get("zero", {})}
    rest = {key: value for key, value in case.items() if key not in ("zero", "fields")}
    fields = {**case.get("fields", LLAMA), "num_hidden_layers": num_layers}
    closed = {"seq_len": 32, "micro_batch_size": 1, "grad_accum_steps": 1, "activation_checkpointing": "none"}
    return run_from_mapping(
        {"model": "small", "layout": {"dp": dp}, **closed, **rest, "zero": zero, "model_config_fields": fields}
    )


def columns(traced):
    """Everything that a trace says, block by block."""
    trace = traced.trace
    blocks = zip(trace.num_bytes, trace.born_at, trace.died_at, trace.category, trace.place, trace.stream, strict=True)
    return {
        "blocks": list(blocks),
        "births": [trace.births[birth] for birth in trace.birth],
        "phases": trace.phases,
        "cache_emptied_at": trace.cache_emptied_at,
        "num_instants": trace.num_instants,
        "numel": (traced.numel_total, traced.numel_trainable),
    }


def compare(case, dp):
    from vramplan.simulate.depths import at_depth, plan_depths
    from vramplan.simulate.engine import trace_rank
    from vramplan.simulate.extend import follow
    from vramplan.simulate.request import Conditions

    plan = plan_depths(run_of(case, dp, 400), run_of(case, dp, 400).layout)
    deep = run_of(case, dp, plan.first + MORE_PERIODS * plan.period)

    def traced(depth):
        found = trace_rank(at_depth(deep, depth), deep.layout, Conditions(), "cuda")
        assert found.error is None, found.error
        return found

    followed = follow([traced(depth) for depth in plan.depths()], MORE_PERIODS)
    if followed is None:
        return plan.depths(), ["they follow no law"], 0
    found, full = columns(followed), columns(traced(deep.model_config_fields["num_hidden_layers"]))
    return plan.depths(), [name for name in full if full[name] != found[name]], len(full["blocks"])


if __name__ == "__main__":
    ranks = int(sys.argv[1])
    known = {**CASES[ranks], **MORE_CASES[ranks]}
    for name in sys.argv[2:]:
        depths, differing, num_blocks = compare(known[name], ranks)
        row = {"case": name, "depths": depths, "differing": differing, "num_blocks": num_blocks}
        sys.stdout.write(f"{json.dumps(row)}\n")
