"""Scores of routers: collected until the model's output goes, and balanced by a loss of their own."""

import pytest

from vramplan.facts.device import Node
from vramplan.facts.devices import find_device
from vramplan.facts.resolve import resolve_architecture
from vramplan.memory.estimate import estimate
from vramplan.spec.run import RunSpec

EXPERTS, LAYERS, BATCH, SEQ = 64, 6, 2, 256
FIELDS = {
    "hidden_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "moe_intermediate_size": 32,
    "vocab_size": 128,
    "num_local_experts": EXPERTS,
    "num_experts": EXPERTS,
}


def found(family, checkpointing="full", **fields):
    run = RunSpec.model_validate(
        {
            "model": family,
            "model_config_fields": {"model_type": family, **FIELDS, **fields},
            "seq_len": SEQ,
            "micro_batch_size": BATCH,
            "grad_accum_steps": 1,
            "attention": "eager",
            "activation_checkpointing": checkpointing,
            "keep_outputs": True,
            "zero": {"stage": 0, "reduce_bucket_size": 1000, "offload_optimizer": "none", "offload_param": "none"},
        }
    )
    return estimate(run, Node(find_device("H100"), 1), resolve_architecture(run))


def forward_end(answer):
    return next(phase.end_bytes for phase in answer.phases if phase.phase == "step1.micro1.forward")


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_the_loss_keeps_scores_and_shares_of_every_layer(family):
    """The output holds the scores, the graph the shares of the softmax; layers that are not walked too."""
    grown = forward_end(found(family, output_router_logits=True)) - forward_end(found(family))
    kept = LAYERS * BATCH * SEQ * EXPERTS * 2 * 2
    assert kept <= grown <= kept * 1.01


def test_llama4_collects_scores_that_its_output_does_not_hold():
    collected, dropped = (found("llama4_text", output_router_logits=asked) for asked in (True, False))
    assert forward_end(collected) == forward_end(dropped)
    assert collected.phases[2].peak_bytes > dropped.phases[2].peak_bytes


def test_jitter_keeps_a_factor_for_every_element():
    noisy, calm = (forward_end(found("mixtral", "none", router_jitter_noise=noise)) for noise in (0.1, 0.0))
    assert noisy - calm == LAYERS * BATCH * SEQ * FIELDS["hidden_size"] * 2
