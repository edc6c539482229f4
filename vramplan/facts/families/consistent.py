"""What the fields of any family's ``config.json`` must agree on, or transformers would not build or run the model."""

from __future__ import annotations

from collections.abc import Mapping

from vramplan.facts.architecture import Architecture, LatentAttention
from vramplan.facts.families.fields import Fields

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional")
"""transformers/modeling_rope_utils.py, ``ROPE_INIT_FUNCTIONS``, and each model's own ``default``."""
_OLDER_NAMES = {"phi3": ("su",)}
"""What a family's own config class takes besides (models/phi3/configuration_phi3.py)."""
_WITHOUT_PADDING = ("bloom", "falcon", "gpt2", "gpt_neox")
"""Families whose token table has no row for padding."""


def check_config(fields: Fields, architecture: Architecture) -> None:
    """Raises:
    ConfigError: two fields contradict each other, or a name is none that transformers knows; the text names the field.
    """
    _check_experts(fields, architecture)
    _check_rotary(fields, architecture)
    padding, vocab = fields.number("pad_token_id", default=0), architecture.vocab_size
    if not -vocab <= padding < vocab and fields.family not in _WITHOUT_PADDING:
        # torch/nn/modules/sparse.py, Embedding.__init__: "Padding_idx must be within num_embeddings"
        raise fields.error("pad_token_id", f"is {padding:.0f}, but the vocabulary ends at {vocab - 1}")


def _check_experts(fields: Fields, architecture: Architecture) -> None:
    for block in architecture.mixtures:
        if block.experts_per_token > block.router.num_experts:
            problem = f"is {block.experts_per_token}, more than the {block.router.num_experts} experts of a layer"
            raise fields.error("num_experts_per_tok", problem)


def _check_rotary(fields: Fields, architecture: Architecture) -> None:
    for layer in architecture.layers:
        mixer = layer.mixer
        whole = isinstance(mixer, LatentAttention) or mixer.rotary_dim == mixer.head_dim
        if whole and mixer.rotary_dim % 2:  # of a part of a head some families rotate one element more
            name = "qk_rope_head_dim" if isinstance(mixer, LatentAttention) else "head_dim"
            name = name if fields.has_value(name) else "num_attention_heads"
            raise fields.error(name, f"makes {mixer.rotary_dim} rotated elements, which do not pair up")
    for name in ("rope_parameters", "rope_scaling"):
        section = fields.section(name)
        for part in () if section is None else _rope_sections(section):
            kind = part.get("rope_type", part.get("type", "default"))
            if kind not in (*ROPE_TYPES, *_OLDER_NAMES.get(fields.family, ())):
                raise fields.error(name, f"has the type {kind!r}, which is none of {', '.join(ROPE_TYPES)}")


def _rope_sections(section: Mapping[str, object]) -> list[Mapping[str, object]]:
    """The section, or those of each kind of layer in it (Gemma-3's newer files)."""
    nested: list[Mapping[str, object]] = [
        part for part in section.values() if isinstance(part, dict) and ({"rope_type", "type"} & part.keys())
    ]
    return nested or [section]
