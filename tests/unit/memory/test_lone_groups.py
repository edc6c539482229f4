"""A sub-group of one parameter, under ZeRO-3: its gradient is not copied to be flattened."""

from __future__ import annotations

import pytest

from vramplan.facts.devices import resolve_node
from vramplan.facts.resolve import resolve_architecture
from vramplan.memory.estimate import estimate
from vramplan.spec.run import RunSpec

TIED = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "vocab_size": 4096,
    "tie_word_embeddings": True,
}
EMBEDDING_PART = 4096 * 256 // 2
"""Elements that each of two ranks holds of the largest group, which is one parameter."""


@pytest.mark.parametrize(("precision", "flat_bytes"), [("fp32", 0), ("bf16", 4)])
def test_a_lone_gradient_is_copied_only_to_be_cast(precision: str, flat_bytes: int):
    run = RunSpec.model_validate(
        {
            "model": "tied",
            "model_config_fields": TIED,
            "precision": precision,
            "seq_len": 64,
            "global_batch_size": 2,
            "micro_batch_size": 1,
            "grad_accum_steps": 1,
            "activation_checkpointing": "none",
            "zero": {
                "stage": 3,
                "offload_optimizer": "none",
                "offload_param": "none",
                "stage3_param_persistence_threshold": 0,
            },
            "optimizer": {"kind": "adamw_torch"},
            "retain": {"layer_lr_decay": 0.8},
            "hardware": {"gpu": "cpu", "gpus_per_node": 2},
        }
    )
    found = estimate(run, resolve_node(run.hardware), resolve_architecture(run), rank=0)
    step = next(phase for phase in found.phases if phase.phase == "step2.micro1.optimizer_step")
    # torch's AdamW on the CPU makes the root and the quotient of one parameter at a time
    assert step.peak_bytes - step.end_bytes == EMBEDDING_PART * (2 * 4 + flat_bytes)
