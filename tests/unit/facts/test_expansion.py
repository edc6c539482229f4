"""Block expansion: a new block is of the kind of the one that it copies, whichever field of the config says so."""

from __future__ import annotations

import pytest

from vramplan.facts.expansion import expand_architecture, expand_config
from vramplan.facts.families import architecture_from_config

from support.small_configs import SMALL

MIXED = [
    ("qwen2_moe", {"decoder_sparse_step": 2, "num_hidden_layers": 4}),
    ("qwen3_moe", {"mlp_only_layers": [1], "num_hidden_layers": 4}),
    ("deepseek_v2", {"first_k_dense_replace": 1}),
    ("deepseek_v3", {"first_k_dense_replace": 3, "num_hidden_layers": 3}),
    ("llama4_text", {"moe_layers": [0, 2], "num_hidden_layers": 4}),
]
FIELDS = dict(SMALL)


@pytest.mark.parametrize("num_new", [1, 2])
@pytest.mark.parametrize(("family", "changed"), MIXED, ids=[family for family, _ in MIXED])
def test_a_new_block_is_of_the_kind_that_it_copies(family, changed, num_new):
    fields = {"model_type": family, **FIELDS[family], **changed}
    expanded = architecture_from_config(expand_config(fields, num_new))
    wanted = expand_architecture(architecture_from_config(fields), num_new)
    kinds = [type(layer.feed_forward) for layer in wanted.layers]
    assert [type(layer.feed_forward) for layer in expanded.layers] == kinds
    assert len(kinds) == fields["num_hidden_layers"] + num_new
