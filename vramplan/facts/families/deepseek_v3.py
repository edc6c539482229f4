"""DeepSeek-V3 and -R1: ``models/deepseek_v3/configuration_deepseek_v3.py`` of transformers 5.17.

The layer that predicts further tokens (MTP) is in the checkpoints but not in transformers' model, so not here.
"""

from __future__ import annotations

from vramplan.facts.architecture import Architecture, DecoderLayer
from vramplan.facts.families.deepseek import latent_attention, mixture_with_shared
from vramplan.facts.families.fields import Fields
from vramplan.facts.families.parts import decoder, norm_pair, one_per_kind, standard_mlp


def build(fields: Fields) -> Architecture:
    """DeepSeek-V2's blocks with a sigmoid router (its correction bias is a buffer, no parameter)."""
    hidden = fields.required_size("hidden_size")
    rotary = "pairs" if fields.flag("rope_interleave", default=True) else "whole"
    mixer = latent_attention(fields, hidden, rotary)
    dense, norms = standard_mlp(fields, hidden), norm_pair(hidden)
    sparse = mixture_with_shared(fields, hidden, scoring="sigmoid_of_groups", default_shared=1, default_groups=(8, 4))
    first_sparse = fields.count("first_k_dense_replace", default=3)
    layers = one_per_kind(
        [index >= first_sparse for index in range(fields.required_size("num_hidden_layers"))],
        lambda is_sparse: DecoderLayer((mixer, sparse if is_sparse else dense, *norms)),
    )
    return decoder(fields, layers, hidden=hidden, default_positions=4096, default_tied=False)
