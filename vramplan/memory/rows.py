"""Tokens that are taken at a time, where no polynomial of the batch gives them."""

from __future__ import annotations

from vramplan.facts.architecture import Architecture
from vramplan.memory.blocks.against_forgetting import KL_CHUNK_TOKENS
from vramplan.memory.blocks.chunked_loss import block_rows
from vramplan.memory.blocks.fused_loss import rows_at_once
from vramplan.spec.retain import RetainSpec


def fused_loss_rows(loss: str, num_tokens: int, architecture: Architecture) -> int:
    """Tokens of a chunk of the loss on one rank; 0 for a loss over whole logits."""
    if loss != "liger":
        return 0
    return rows_at_once(num_tokens, architecture.vocab_size, architecture.hidden_size)


def chunk_rows(loss: str, num_tokens: int, architecture: Architecture) -> tuple[int, int]:
    """Tokens of the first two blocks of the chunked loss on one rank of the CPU; (0, 0) for one block, or none."""
    return block_rows(num_tokens, architecture.vocab_size) if loss == "chunked" else (0, 0)


def tile_rows(batch: int, positions: int, architecture: Architecture) -> int:
    """Tokens that a tiled MLP takes at a time: stretches of each sequence about as long as the model is wide, all of
    one length (``torch.chunk``)."""
    return batch * -(-positions // -(-positions // architecture.hidden_size))


def kl_chunk_tokens(retain: RetainSpec, num_tokens: int) -> int:
    """Tokens whose probabilities the KL term has at once on one rank; 0 without it."""
    return 0 if retain.kl is None else min(KL_CHUNK_TOKENS, num_tokens)
