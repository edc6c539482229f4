"""Liger's kernels, tiled MLPs and inputs of layers on the host: what a layer keeps of a token, by hand."""

import pytest

from vramplan.errors import SpecError
from vramplan.facts.device import Node
from vramplan.facts.devices import find_device
from vramplan.facts.resolve import resolve_architecture
from vramplan.memory.estimate import estimate
from vramplan.spec.run import RunSpec

H, WIDE, A, K, D = 64, 96, 4, 2, 16
SEQ = 256
FIELDS = {
    "model_type": "llama",
    "hidden_size": H,
    "intermediate_size": WIDE,
    "num_attention_heads": A,
    "num_key_value_heads": K,
    "vocab_size": 128,
}


def found(layers, micro_batch, **fields):
    run = RunSpec.model_validate(
        {
            "model": "small",
            "model_config_fields": {**FIELDS, "num_hidden_layers": layers},
            "seq_len": SEQ,
            "micro_batch_size": micro_batch,
            "grad_accum_steps": 1,
            "activation_checkpointing": "none",
            "zero": {"stage": 0, "offload_optimizer": "none", "offload_param": "none"},
            **fields,
        }
    )
    return estimate(run, Node(find_device("H100"), 1), resolve_architecture(run))


def kept(**fields):
    """Bytes that one more layer keeps of one more token when forward is done."""
    ends = {
        (layers, batch): found(layers, batch, **fields).phases[2].end_bytes for layers in (5, 6) for batch in (2, 3)
    }
    more = ends[6, 3] - ends[6, 2] - ends[5, 3] + ends[5, 2]
    assert more % SEQ == 0
    return more // SEQ


ATTENTION = 4 * A * D + 4 * K * D + 4 * A  # queries and result, keys and values, a row sum a head


def test_liger_keeps_no_wide_copies():
    assert kept(kernels="liger") == 8 * H + 8 + ATTENTION + 6 * WIDE


def test_a_tiled_mlp_keeps_its_input_alone():
    assert kept(kernels="liger", tiled_mlp=True) == 8 * H + 8 + ATTENTION


def test_inputs_on_the_host_leave_the_device():
    checkpointed = {"activation_checkpointing": "full"}
    assert kept(**checkpointed) == 2 * H
    assert kept(**checkpointed, offload_activations="cpu") == 0
    on_host = {term.name: term.num_bytes for term in found(5, 3, **checkpointed, offload_activations="cpu").host_terms}
    assert on_host["host: inputs of layers"] == 5 * 3 * SEQ * 2 * H


def test_a_family_whose_norms_liger_replaces_in_another_way_is_refused():
    with pytest.raises(SpecError, match="liger's kernels, or tiled MLPs, of the gemma family"):
        found(2, 1, model_config_fields={**FIELDS, "model_type": "gemma", "num_hidden_layers": 2}, kernels="liger")
