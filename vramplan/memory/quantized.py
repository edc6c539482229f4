"""Bytes of weights in NF4 with double quantization, as bitsandbytes keeps them.

Paper: Dettmers et al. 2023, "QLoRA" (arXiv 2305.14314). Code: bitsandbytes/functional.py (0.50), ``quantize_4bit`` and
``quantize_blockwise``; which modules: transformers/integrations/bitsandbytes.py, ``replace_with_bnb_linear`` (every
linear but the head).
"""

from __future__ import annotations

BLOCK = 64
"""Weights that share one scale (``quantize_4bit``, default ``blocksize``)."""
NESTED_BLOCK = 256
"""Scales that share one fp32 scale of their own (``quantize_blockwise(..., blocksize=256)``)."""
_CODE_BYTES = 16 * 4 + 256 * 4
"""The tables of 16 and of 256 values that each weight's state holds."""
_OFFSET_BYTES = 4


def packed_numel(numel: int, storage_bytes: int) -> int:
    """Elements of so many bytes as which packed weights lie (``bnb_4bit_quant_storage``): two weights to a byte."""
    return -(-numel // (2 * storage_bytes))


def nf4_bytes(numel: int) -> int:
    """One weight: two to a byte, and its state."""
    return -(-numel // 2) + nf4_state_bytes(numel)


def nf4_state_bytes(numel: int) -> int:
    """A scale in 8 bits for each 64 weights, its own scale in fp32 for each 256 of those, and the tables."""
    blocks = -(-numel // BLOCK)
    return blocks + 4 * -(-blocks // NESTED_BLOCK) + _CODE_BYTES + _OFFSET_BYTES


def quantizing_bytes(numel: int, width: int) -> int:
    """What the CPU holds at most, beside the weight of ``width`` bytes an element, while it packs it: an fp32 copy
    (fp32 itself is not copied), its scaled copy, their bucket numbers in int32, those in bytes, and two halves of them
    that are laid together; a scale of each block (bitsandbytes/backends/default/ops.py, ``quantize_4bit``; the profiler
    shows 10.06 bytes an element of fp32 and 14.06 of bf16)."""
    copied = 0 if width == 4 else 4 * numel
    return copied + 10 * numel + 4 * -(-numel // BLOCK)
