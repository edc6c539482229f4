"""One small config of every family with nothing but what must be given, and variants that switch the rest on."""

from __future__ import annotations

from typing import Any

SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 128,
}
FEW_KV = {**SIZES, "num_key_value_heads": 2}
LATENT = {
    **SIZES,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "moe_intermediate_size": 32,
    "num_experts_per_tok": 2,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
}
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 128}
OPT = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 96, "vocab_size": 128}
BLOOM = {"hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 128}
FALCON = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 128}
QWEN_MOE = {**SIZES, "num_key_value_heads": 2, "num_experts": 4, "moe_intermediate_size": 32, "num_experts_per_tok": 2}

SMALL: list[tuple[str, dict[str, Any]]] = [
    ("gpt2", GPT2),
    ("gpt2", {**GPT2, "n_inner": 96, "tie_word_embeddings": False}),
    ("gpt2", {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 128}),
    ("gpt_neox", SIZES),
    ("gpt_neox", {**SIZES, "use_parallel_residual": False, "attention_bias": False, "rotary_pct": 0.5}),
    ("opt", OPT),
    ("opt", {**OPT, "word_embed_proj_dim": 32, "do_layer_norm_before": False}),
    ("opt", {**OPT, "enable_bias": False, "layer_norm_elementwise_affine": False}),
    ("bloom", BLOOM),
    ("falcon", FALCON),
    ("falcon", {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    ("falcon", {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1}),
    ("falcon", {**FALCON, "multi_query": False, "parallel_attn": False, "bias": True, "alibi": True}),
    ("llama", SIZES),
    ("llama", {**FEW_KV, "attention_bias": True, "mlp_bias": True, "head_dim": 32, "tie_word_embeddings": True}),
    ("mistral", {**SIZES, "num_key_value_heads": 2}),
    ("mistral", {**FEW_KV, "head_dim": 32, "sliding_window": None}),
    ("mixtral", {**FEW_KV, "num_local_experts": 4}),
    ("qwen2", FEW_KV),
    ("qwen2", {**FEW_KV, "use_sliding_window": True, "max_window_layers": 1, "sliding_window": 16}),
    ("qwen2_moe", {**QWEN_MOE, "shared_expert_intermediate_size": 48}),
    (
        "qwen2_moe",
        {
            **QWEN_MOE,
            "shared_expert_intermediate_size": 48,
            "decoder_sparse_step": 2,
            "qkv_bias": False,
            "use_sliding_window": True,
            "max_window_layers": 2,
        },
    ),
    ("qwen3", FEW_KV),
    ("qwen3", {**FEW_KV, "attention_bias": True, "head_dim": 16, "tie_word_embeddings": True}),
    ("qwen3_moe", QWEN_MOE),
    ("qwen3_moe", {**QWEN_MOE, "head_dim": 32, "mlp_only_layers": [1], "attention_bias": True}),
    ("gemma", {**SIZES, "num_key_value_heads": 2}),
    ("gemma2", FEW_KV),
    ("gemma2", {**FEW_KV, "final_logit_softcapping": None, "attn_logit_softcapping": None, "attention_bias": True}),
    ("gemma3_text", {**FEW_KV, "num_hidden_layers": 7}),
    ("gemma3_text", {"num_hidden_layers": 2}),
    ("phi", SIZES),
    ("phi", {**FEW_KV, "qk_layernorm": True, "tie_word_embeddings": True}),
    ("phi3", SIZES),
    ("phi3", {**FEW_KV, "tie_word_embeddings": True, "partial_rotary_factor": 0.75, "sliding_window": 16}),
    ("stablelm", {**SIZES, "num_key_value_heads": 4}),
    ("stablelm", {**FEW_KV, "use_parallel_residual": True, "qk_layernorm": True, "use_qkv_bias": True}),
    ("olmo", SIZES),
    ("olmo2", FEW_KV),
    ("smollm3", {**SIZES, "num_hidden_layers": 5}),
    ("smollm3", {**FEW_KV, "attention_bias": True, "mlp_bias": True, "no_rope_layers": [1, 0, 1]}),
    ("granite", SIZES),
    ("granite", {**FEW_KV, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    ("glm", SIZES),
    ("glm", {**FEW_KV, "attention_bias": False, "head_dim": 16}),
    ("cohere", SIZES),
    ("cohere", {**FEW_KV, "use_qk_norm": True}),
    ("starcoder2", {**SIZES, "num_key_value_heads": 2}),
    ("starcoder2", {**FEW_KV, "use_bias": False, "sliding_window": 16, "tie_word_embeddings": False}),
    ("deepseek_v2", LATENT),
    ("deepseek_v2", {**LATENT, "q_lora_rank": None, "first_k_dense_replace": 1, "attention_bias": True}),
    ("deepseek_v3", {**LATENT, "n_group": 2, "topk_group": 1}),
    ("deepseek_v3", {**LATENT, "n_group": 2, "topk_group": 1, "q_lora_rank": 24, "first_k_dense_replace": 1}),
    ("gpt_oss", {**FEW_KV, "num_local_experts": 4}),
    ("llama4_text", {**FEW_KV, "num_local_experts": 4}),
    ("llama4_text", {**FEW_KV, "num_local_experts": 4, "interleave_moe_layer_step": 2, "intermediate_size_mlp": 80}),
    (
        "llama4_text",
        {
            **FEW_KV,
            "num_hidden_layers": 4,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "attention_chunk_size": 64,
            "use_qk_norm": False,
            "attention_bias": True,
            "tie_word_embeddings": True,
        },
    ),
]
"""``(model_type, fields)``."""


def label(entry: tuple[str, dict[str, Any]]) -> str:
    """A test id: the family and how many of its fields differ from those of its first entry."""
    model_type, fields = entry
    first = next(others for other, others in SMALL if other == model_type)
    return "-".join([model_type, *(key for key in fields if fields.get(key) != first.get(key))])
