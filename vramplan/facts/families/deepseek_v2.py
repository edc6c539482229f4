"""DeepSeek-V2 and -V2-Lite: ``models/deepseek_v2/configuration_deepseek_v2.py`` of transformers 5.17."""

from __future__ import annotations

from vramplan.facts.architecture import Architecture, DecoderLayer
from vramplan.facts.families.deepseek import latent_attention, mixture_with_shared
from vramplan.facts.families.fields import Fields
from vramplan.facts.families.parts import decoder, norm_pair, one_per_kind, standard_mlp, whole_multiple


def build(fields: Fields) -> Architecture:
    """Latent attention; after the first dense layers, routed experts beside shared ones."""
    hidden = fields.required_size("hidden_size")
    whole_multiple(fields, hidden, fields.required_size("num_attention_heads"))
    mixer = latent_attention(fields, hidden, "complex")
    bias = fields.flag("mlp_bias", default=False)
    dense, norms = standard_mlp(fields, hidden, bias=bias), norm_pair(hidden)
    grouped = fields.text("topk_method", default="greedy") == "group_limited_greedy"
    scoring = "softmax_of_groups" if grouped else "softmax_greedy"
    sparse = mixture_with_shared(fields, hidden, scoring=scoring, default_shared=2, bias=bias)
    first_sparse = fields.count("first_k_dense_replace", default=0)
    layers = one_per_kind(
        [index >= first_sparse for index in range(fields.required_size("num_hidden_layers"))],
        lambda is_sparse: DecoderLayer((mixer, sparse if is_sparse else dense, *norms)),
    )
    return decoder(fields, layers, hidden=hidden, default_positions=2048, default_tied=False)
