"""What decides the bytes of one micro-batch, besides the batch itself."""

from __future__ import annotations

from dataclasses import dataclass

from vramplan.facts.architecture import Architecture
from vramplan.facts.dtype import Dtype
from vramplan.memory.gathers import LEAF_FAMILIES, GatherLimits
from vramplan.spec.trainable import Method


@dataclass(frozen=True)
class ModelRun:
    """What decides the bytes of one micro-batch, besides the batch itself."""

    architecture: Architecture
    method: Method
    dtype: Dtype
    autocast: Dtype | None
    device: str
    attention: str
    checkpointing: bool
    """Whether layers are recomputed, those of which ``recomputes`` says so."""
    keep_outputs: bool
    checkpoint_every: int = 1
    """Layers of which the first is recomputed, the rest not."""
    reentrant: bool = False
    """Whether a recomputed layer runs without a graph first, and its backward inside another."""
    shifted_logits: bool = False
    """Whether the loss copies the fp32 logits to shift them."""
    loss: str = "hf"
    chunk_rows: tuple[int, int] = (0, 0)
    """Tokens of the chunked loss's first block and of the next; (0, 0): one block has all, or none is needed."""
    fused_loss_rows: int = 0
    """Tokens of a chunk of the fused loss; 0: the model's own loss over whole logits."""
    liger_kernels: bool = False
    """Whether norms, rotary positions and MLPs are liger-kernel's."""
    tile_rows: int = 0
    """Tokens that an MLP takes at a time; 0: all."""
    host_checkpoints: bool = False
    """Whether inputs of checkpointed layers are kept in the host's memory."""
    sequence_parallel: int = 1
    lone_sequence: bool = False
    adapter_dtype: Dtype | None = None
    """Format of adapters where it is not that of the weights."""
    windowed: bool = False
    """Whether sequences reach the sliding window."""
    masked: bool = False
    """Whether sequences are padded or packed."""
    given_positions: bool = False
    """Whether the batch brings positions of every token, so that nothing made of them is shared by its sequences."""
    kl_chunk_tokens: int = 0
    """Tokens whose probabilities the KL term has at once; 0: there is none."""
    springs: frozenset[str] = frozenset()
    """Penalties that pull at trained weights in this backward: ``l2sp``, ``ewc``; or ``fisher``: each gradient is
    squared and added to the diagonal."""
    spring_ranks: int = 1
    """Ranks that share each weight's pull."""
    adds_gradients: bool = False
    """Whether each gradient is added to one that earlier micro-batches left, before springs pull."""
    springs_on_host: bool = False
    """Whether the pull is made in the host's memory, where offloaded weights are."""
    adapted_parameters: frozenset[str] = frozenset()
    """Parameters of experts and routers that get adapters as they are."""
    own_linears: bool = True
    """Whether linears are DeepSpeed's own under ZeRO-3 (``memory_efficient_linear``)."""
    gathers: GatherLimits | None = None
    """Thresholds of ZeRO-3's gathering, or None where weights stay whole."""

    @property
    def leaves(self) -> str:
        """What ZeRO-3 takes as one module (``BlockContext.leaves``)."""
        if self.gathers is None:
            return "none"
        if self.gathers.leaf_layers:
            return "layers"
        return "mixtures" if self.architecture.family in LEAF_FAMILIES else "none"

    def recomputes(self, index: int) -> bool:
        """Whether a layer keeps its input alone (transformers/modeling_utils.py, ``_set_gradient_checkpointing``)."""
        return self.checkpointing and index % self.checkpoint_every == 0
