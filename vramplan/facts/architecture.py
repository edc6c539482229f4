"""A model as a sequence of typed blocks (``facts/blocks.py``); each block lists its parameter tensors.

``facts/families/`` builds these from a ``config.json``; ``memory/blocks/`` says what each block keeps for
backward; neither knows the other. Names of tensors are those of ``model.named_parameters()`` in the installed
transformers, in its order (the order decides which gradient comes first).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from vramplan.facts.blocks import (
    Attention,
    Embedding,
    GatedMLP,
    LatentAttention,
    Linear,
    Norm,
    ParamTensor,
    PlainMLP,
    Role,
)
from vramplan.facts.dtype import Dtype
from vramplan.facts.mixture import Experts, MixtureOfExperts, Router

__all__ = [
    "Architecture",
    "Attention",
    "DecoderLayer",
    "Embedding",
    "Experts",
    "GatedMLP",
    "LatentAttention",
    "Linear",
    "MixtureOfExperts",
    "Norm",
    "ParamTensor",
    "PlainMLP",
    "Role",
    "Router",
]


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """One decoder layer. ``parts`` in registration order: an attention, an MLP or experts, and norms.

    ``residual`` is the arrangement, ``x`` being the layer's input:

    ``sequential``  ``x += attention(norm(x))``, then ``x += mlp(norm(x))`` (Llama)
    ``parallel``    ``x + (attention(norm(x)) + mlp(norm(x)))``: two norms (GPT-NeoX) or one for both (Phi)
    ``in_turn``     ``(x + attention(norm(x))) + mlp(norm(x))``: the same, added in another order (Cohere, StableLM)
    ``inside``      as ``sequential``, added by attention and MLP themselves (BLOOM)
    ``post``        ``x = norm(x + attention(x))``, then ``x = norm(x + mlp(x))`` (OPT-350m)
    ``norm_after``  ``x += norm(attention(x))``, then ``x += norm(mlp(x))`` (OLMo-2)
    ``sandwich``    ``x += norm(attention(norm(x)))``, then ``x += norm(mlp(norm(x)))`` (Gemma-2)
    """

    parts: tuple[Attention | LatentAttention | GatedMLP | PlainMLP | MixtureOfExperts | Norm, ...]
    residual: str = "sequential"
    residual_dropout: float = 0.0
    dropout_modules: tuple[str, str] = ("", "")
    """The modules of that dropout on the attention's branch and on the MLP's; empty: the layer calls the function."""
    drops_attention: bool = True
    """Whether that dropout acts on the attention's branch too (StableLM: on the MLP's alone)."""
    residual_scaled: bool = False
    """Both branches are multiplied by a constant before they are added (Granite)."""
    feed_forward_name: str = "mlp"
    """The module that the MLP or the experts are; empty: the layer calls the MLP's linears itself (OPT)."""
    views_result: bool = False
    """In a sequential layer: the result of the MLP is added as a view (Llama-4)."""
    names_attention: Literal["", "result", "input and result"] = ""
    """In a sequential layer: what of attention has a name of its own, and stays until the layer is done (GPT-2,
    Llama-4; both: StableLM, Falcon-RW)."""
    norms_first: bool = False
    """In a parallel layer: both norms run before attention, and its branch is added to the MLP's in place (Falcon)."""

    @property
    def mixer(self) -> Attention | LatentAttention:
        """What mixes tokens."""
        return next(part for part in self.parts if isinstance(part, Attention | LatentAttention))

    @property
    def feed_forward(self) -> GatedMLP | PlainMLP | MixtureOfExperts:
        """What acts on each token alone."""
        return next(part for part in self.parts if isinstance(part, GatedMLP | PlainMLP | MixtureOfExperts))

    @property
    def attention(self) -> Attention:
        """The mixer of a layer that has plain attention; ask ``mixer`` where it may be latent."""
        mixer = self.mixer
        if not isinstance(mixer, Attention):
            raise TypeError(f"this layer mixes tokens with {type(mixer).__name__}, not Attention")
        return mixer

    @property
    def mlp(self) -> GatedMLP | PlainMLP:
        """The MLP of a dense layer; ask ``feed_forward`` where it may be experts."""
        feed_forward = self.feed_forward
        if isinstance(feed_forward, MixtureOfExperts):
            raise TypeError("this layer has experts, not one MLP")
        return feed_forward

    @property
    def norms(self) -> tuple[Norm, ...]:
        return tuple(part for part in self.parts if isinstance(part, Norm))

    def tensors(self) -> Iterator[ParamTensor]:
        for part in self.parts:
            yield from part.tensors()

    def linears(self) -> Iterator[Linear]:
        for part in self.parts:
            if not isinstance(part, Norm):
                yield from part.linears()


@dataclass(frozen=True)
class Architecture:
    """A decoder-only language model: embeddings, layers, final norm, head.

    ``layer_prefix`` and the names inside the blocks give every parameter its full name:
    ``f"{layer_prefix}.{index}.{tensor.name}"``.
    """

    family: str
    hidden_size: int
    vocab_size: int
    max_positions: int
    embeddings: tuple[Embedding, ...]
    layers: tuple[DecoderLayer, ...]
    final_norm: Norm | None
    head: Linear
    tied_embeddings: bool
    """Whether the head's weight is the first embedding's (a head's bias is its own all the same)."""
    layer_prefix: str = "model.layers"
    embedding_dropout: float = 0.0
    embedding_dropout_module: str = ""
    """The module of that dropout, if it is one."""
    holds_embedding: bool = True
    """Whether the inner model holds the table's output until it returns, not what dropout made of it (as Phi)."""
    reads_embedding: bool = False
    """The inner model reads the table's weight (its device), by which ZeRO-3 takes it for the model's own (Llama-4)."""
    embedding_scaled: bool = False
    """The embedding output is multiplied by a constant (Gemma, Granite): one more tensor of the residual."""
    scaled_outside: bool = False
    """It is multiplied after the table's module has returned (Granite), not in it (Gemma)."""
    rotary_of_kind: bool = False
    """Sliding layers and the others have rotary tables of their own (Gemma-3)."""
    logits_softcap: bool = False
    """``softcap * tanh(logits / softcap)`` (Gemma-2): three more tensors of the logits' size."""
    logits_scaled: bool = False
    """The logits are multiplied or divided by a constant (Granite, Cohere): one more tensor of the logits' size."""
    embedding_norm: Norm | None = None
    """A norm on the embedding's output, registered after it (BLOOM)."""
    embedding_projections: tuple[Linear, ...] = ()
    """Between the embedding's width and the layers': out, in; registered after the embeddings (OPT-350m)."""
    norm_before_layers: bool = False
    """The final norm is registered before the layers (OPT)."""
    both_masks: bool = False
    """Masks of both kinds are made whichever kinds its layers are of (Gemma-2 and 3, gpt-oss, Llama-4; Qwen and SmolLM3
    where any layer slides)."""
    masks_by_document: bool = True
    """Masks are made with positions, by which packed documents do not see each other (not BLOOM's, Falcon's, OPT's and
    gpt-oss's)."""
    spare_mask: bool = False
    """A mask for sliding layers is made though none slides (Qwen2-MoE: its window is then 0, which all reach)."""
    router_scores: str = "dropped"
    """What becomes of the scores of every router: ``dropped``, ``collected`` (``output_router_logits`` of Llama-4,
    whose loss does not look at them), or ``balanced``, in a loss of their own that is added to the model's."""
    stored_dtype: Dtype | None = None
    """Format of the checkpoint's weights, where ``config.json`` says it (``dtype``, before transformers 5
    ``torch_dtype``)."""
    stored_quantization: str = ""
    """What the checkpoint's weights are packed with (``quant_method`` of ``quantization_config``), if anything."""
    extra: dict[str, object] = field(default_factory=dict, compare=False)

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @cached_property
    def has_own_core(self) -> bool:
        """Whether the family computes attention in a way of its own (BLOOM, Falcon)."""
        mixers = (layer.mixer for layer in self.layers)
        return any(isinstance(mixer, Attention) and mixer.core != "shared" for mixer in mixers)

    @cached_property
    def has_sinks(self) -> bool:
        """Whether any of its layers attends to a learned sink besides the tokens (gpt-oss)."""
        mixers = (layer.mixer for layer in self.layers)
        return any(isinstance(mixer, Attention) and mixer.sinks for mixer in mixers)

    @cached_property
    def linear_routers(self) -> tuple[str, ...]:
        """Full names of the routers that are linears."""
        blocks = ((index, layer.feed_forward) for index, layer in enumerate(self.layers))
        return tuple(
            f"{self.layer_prefix}.{index}.{block.router.name}"
            for index, block in blocks
            if isinstance(block, MixtureOfExperts) and block.router.is_linear
        )

    @cached_property
    def mixtures(self) -> tuple[MixtureOfExperts, ...]:
        """The blocks with experts of its layers, in order."""
        blocks = (layer.feed_forward for layer in self.layers)
        return tuple(block for block in blocks if isinstance(block, MixtureOfExperts))

    @cached_property
    def has_latent_attention(self) -> bool:
        return any(isinstance(layer.mixer, LatentAttention) for layer in self.layers)

    @cached_property
    def windows(self) -> frozenset[int]:
        """The sliding windows and chunks of its layers, in tokens."""
        return frozenset(layer.mixer.local_window for layer in self.layers if layer.mixer.local_window is not None)

    def named_tensors(self) -> Iterator[ParamTensor]:
        """Every unique parameter tensor by its full name, in registration order (a tied head's weight is left out)."""
        final_norm = () if self.final_norm is None else tuple(self.final_norm.tensors())
        for embedding in self.embeddings:
            yield from embedding.tensors()
        if self.embedding_norm is not None:
            yield from self.embedding_norm.tensors()
        for projection in self.embedding_projections:
            yield from projection.tensors()
        if self.norm_before_layers:
            yield from final_norm
        for index, layer in enumerate(self.layers):
            for tensor in layer.tensors():
                yield ParamTensor(f"{self.layer_prefix}.{index}.{tensor.name}", tensor.shape, tensor.role)
        if not self.norm_before_layers:
            yield from final_norm
        for tensor in self.head.tensors():
            if not (self.tied_embeddings and tensor.name == f"{self.head.name}.weight"):
                yield tensor

    def named_linears(self) -> Iterator[tuple[str, Linear]]:
        """Every dense projection but the head by its full module name."""
        for projection in self.embedding_projections:
            yield projection.name, projection
        for index, layer in enumerate(self.layers):
            for linear in layer.linears():
                yield f"{self.layer_prefix}.{index}.{linear.name}", linear

    @cached_property
    def _hash(self) -> int:
        return hash((self.family, self.hidden_size, self.vocab_size, self.embeddings, self.layers, self.head))

    def __hash__(self) -> int:
        """Computed once: an architecture is the key of every cache of the arithmetic."""
        return self._hash

    @cached_property
    def num_params(self) -> int:
        """Unique parameters, as ``sum(p.numel() for p in model.parameters())`` counts them."""
        return sum(tensor.numel for tensor in self.named_tensors())

    @cached_property
    def params_by_role(self) -> dict[Role, int]:
        counts = dict.fromkeys(Role, 0)
        for tensor in self.named_tensors():
            counts[tensor.role] += tensor.numel
        return counts
