"""The typed blocks that models are made of; each lists its parameter tensors.

Names of tensors are relative to the layer (or the model) that holds the block. Where two spellings of one thing differ
in what they keep for backward, the block says which it is; what that costs stands in ``memory/blocks/``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from math import prod
from typing import ClassVar


class Role(Enum):
    """What a parameter tensor is for; the per-role counts of ``vramplan models``."""

    EMBEDDING = "embedding"
    ATTENTION = "attention"
    MLP = "mlp"
    EXPERTS = "experts"
    ROUTER = "router"
    NORM = "norm"
    HEAD = "head"


@dataclass(frozen=True, slots=True)
class ParamTensor:
    """One parameter tensor: its name below the block that owns it, its shape and its role."""

    name: str
    shape: tuple[int, ...]
    role: Role

    @property
    def numel(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class Linear:
    """A dense projection ``(..., in_features) -> (..., out_features)``.

    ``conv1d`` marks transformers' ``Conv1D`` (GPT-2), whose weight is stored ``(in, out)``.
    """

    name: str
    in_features: int
    out_features: int
    bias: bool
    role: Role
    conv1d: bool = False
    by_matmul: bool = False
    """``x @ weight.T`` and the bias added after it (Falcon) instead of ``F.linear``."""
    shares_input: bool = False
    """Whether each rank of tensor parallelism has a share of its outputs, for which all need the whole input."""

    def tensors(self) -> Iterator[ParamTensor]:
        shape = (self.in_features, self.out_features) if self.conv1d else (self.out_features, self.in_features)
        yield ParamTensor(f"{self.name}.weight", shape, self.role)
        if self.bias:
            yield ParamTensor(f"{self.name}.bias", (self.out_features,), self.role)

    @property
    def weight_numel(self) -> int:
        return self.in_features * self.out_features

    @property
    def is_nn_linear(self) -> bool:
        """Whether its module is of the very class ``nn.Linear`` (GPT-2's and Falcon's are not)."""
        return not (self.conv1d or self.by_matmul)


@dataclass(frozen=True, slots=True)
class Norm:
    """A normalisation over ``width`` elements.

    ``kind`` is the code that transformers runs:

    ``rms``          fp32 copy, scaled, cast back, then times the weight (Llama)
    ``rms_fp32``     the same, but the weight is applied before the cast back (OLMo-2, gpt-oss)
    ``rms_gemma``    the same with ``1 + weight`` in fp32 (Gemma)
    ``rms_last``     as ``rms``, the weight being the second factor (Llama-4)
    ``l2``           RMS without a weight (Llama-4's queries and keys)
    ``layer``        ``torch.nn.LayerNorm``: one fused op
    ``layer_fp32``   the fused op on an fp32 copy, without parameters (OLMo)
    ``layer_python`` mean and variance in separate fp32 ops, weight and no bias (Cohere)
    """

    name: str
    width: int
    kind: str = "rms"
    bias: bool = False
    affine: bool = True
    num_heads: int | None = None
    """Heads with a weight each, where the norm acts on each head with its own; None: one weight for all."""
    separate_heads: bool = False
    """Whether each of those heads is a module of its own (StableLM) instead of a row of one weight (Cohere)."""

    def tensors(self) -> Iterator[ParamTensor]:
        if not self.affine:
            return
        if self.separate_heads:
            for head in range(self.num_heads or 0):
                yield ParamTensor(f"{self.name}.norms.{head}.weight", (self.width,), Role.NORM)
            return
        shape = (self.width,) if self.num_heads is None else (self.num_heads, self.width)
        yield ParamTensor(f"{self.name}.weight", shape, Role.NORM)
        if self.bias:
            yield ParamTensor(f"{self.name}.bias", shape, Role.NORM)


@dataclass(frozen=True, slots=True)
class Embedding:
    """A lookup table ``num_embeddings x width``."""

    name: str
    num_embeddings: int
    width: int
    each_sequence: bool = False
    """Whether positions are looked up for each sequence on its own (OPT) and not once for the batch."""

    def tensors(self) -> Iterator[ParamTensor]:
        yield ParamTensor(f"{self.name}.weight", (self.num_embeddings, self.width), Role.EMBEDDING)


@dataclass(frozen=True, slots=True)
class Attention:
    """Softmax attention with ``num_heads`` query heads and ``num_kv_heads`` key/value heads of ``head_dim``.

    ``projections``: those of query, key and value in registration order, or one fused; the output projection last.
    ``q_norm``/``k_norm`` act on each head (width ``head_dim``) or on the whole projection (OLMo-2).
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    projections: tuple[Linear, ...]
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    sliding_window: int | None = None
    dropout: float = 0.0
    rotary_dim: int = 0
    """Elements of each head that are rotated: ``head_dim`` for Llama, 0 for learned positions (GPT-2)."""
    rotary: str = "whole"
    """How positions are applied, by what it keeps:

    ``whole``        ``x * cos + rotate_half(x) * sin`` (Llama)
    ``sliced``       the same on a slice of each head, which is then joined with the rest (GPT-NeoX, Phi-3)
    ``named_slices`` sliced, and the module holds the slices until it is done (Phi, StableLM)
    ``paired``       sliced, and each layer widens the tables to neighbouring pairs (GLM)
    ``halves``       ``a * cos - b * sin`` and ``b * cos + a * sin`` of each head's halves, joined (gpt-oss)
    ``fp32``         whole, with fp32 tables and a cast back (OLMo)
    ``fp32_inputs``  whole, on fp32 copies of queries and keys (Cohere)
    ``complex``      a product of complex numbers in fp32 (Llama-4)
    """
    normed_at_once: bool = False
    """Norms of queries and keys come right after the projection of each (OLMo-2, Qwen3), not after all three."""
    normed_late: bool = False
    """Norms of queries and keys come after the rotation (Llama-4)."""
    tempered: bool = False
    """Queries are multiplied by an fp32 factor of each position (Llama-4's layers without rotation)."""
    softmax_fp32: bool = True
    """Eager attention takes its softmax in fp32 (not Llama-4)."""
    fused: str = "split"
    """How one fused projection is cut into query, key and value:

    ``split``  views of one split (GPT-2, GPT-NeoX)
    ``slices`` a slice each (Phi-3)
    ``select`` a selection each along an axis of three (BLOOM, Falcon-RW)
    ``index``  a slice for the queries, gathered copies for key and value (Falcon-7B)
    ``spread`` gathered, and copied to every query head (Falcon-40B)
    """
    core: str = "shared"
    """Whose code runs scores and values: ``shared`` by most families, or that of ``bloom`` or ``falcon``."""
    order: tuple[int, int, int] = (0, 1, 2)
    """Where query, key and value are among the projections."""
    q_scaled: bool = False
    """The query is multiplied by a constant before it is cut into heads (OPT)."""
    alibi: bool = False
    """Positions come in as a bias on the scores (BLOOM)."""
    softcap: bool = False
    """``cap * tanh(scores / cap)`` in eager attention (Gemma-2)."""
    clip_qkv: bool = False
    """Query, key and value are clamped in place (OLMo)."""
    chunk: int | None = None
    """Tokens of a chunk that attends only within itself (Llama-4); None: no chunks."""
    casts_softmax: bool = True
    """Whether what eager attention's softmax made is cast to the format of queries and values (not in Llama-4)."""
    sinks: bool = False
    """One more learned score a head, so that attention can look at nothing (gpt-oss)."""
    out_first: bool = False
    """The output projection is registered before the fused one (Phi-3)."""

    @property
    def local_window(self) -> int | None:
        """Tokens that a query sees at most, before it or in its chunk; None: all."""
        return self.chunk if self.sliding_window is None else self.sliding_window

    @property
    def q_width(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def out_width(self) -> int:
        """Features a token that come out of the core."""
        return self.q_width

    @property
    def fused_qkv(self) -> bool:
        return len(self.projections) == 2

    @property
    def out(self) -> Linear:
        return self.projections[-1]

    def tensors(self) -> Iterator[ParamTensor]:
        if self.sinks:
            prefix = self.out.name.rpartition(".")[0]
            yield ParamTensor(f"{prefix}.sinks", (self.num_heads,), Role.ATTENTION)
        for linear in self.projections[::-1] if self.out_first else self.projections:
            yield from linear.tensors()
        for norm in (self.q_norm, self.k_norm):
            if norm is not None:
                yield from norm.tensors()

    def linears(self) -> Iterator[Linear]:
        yield from self.projections


@dataclass(frozen=True, slots=True)
class LatentAttention:
    """DeepSeek's multi-head latent attention: keys and values come out of one narrow projection.

    ``parts`` in registration order: query down, its norm, query up (or one query projection where ``q_rank`` is
    None); key/value down, its norm, key/value up; output projection last.
    """

    num_heads: int
    q_rank: int | None
    kv_rank: int
    nope_head_dim: int
    rotary_dim: int
    """Rotated elements of a head; those of the keys are shared by all heads."""
    v_head_dim: int
    parts: tuple[Linear | Norm, ...]
    dropout: float = 0.0
    rotary: str = "pairs"
    """How positions are applied, by what it keeps:

    ``pairs``   cosines and sines of half a head's width, on even and odd elements apart (DeepSeek-V3)
    ``whole``   ``x * cos + rotate_half(x) * sin`` (DeepSeek-V3 with ``rope_interleave: false``)
    ``complex`` a product of complex numbers in fp32 (DeepSeek-V2)
    """

    # What the core asks of every kind of attention.
    core: ClassVar[str] = "shared"
    local_window: ClassVar[None] = None
    softmax_fp32: ClassVar[bool] = True
    casts_softmax: ClassVar[bool] = True
    softcap: ClassVar[bool] = False
    alibi: ClassVar[bool] = False

    @property
    def qk_head_dim(self) -> int:
        return self.nope_head_dim + self.rotary_dim

    @property
    def num_kv_heads(self) -> int:
        """Heads of keys and values once they are expanded."""
        return self.num_heads

    @property
    def q_width(self) -> int:
        return self.num_heads * self.qk_head_dim

    @property
    def out_width(self) -> int:
        """Features a token that come out of the core."""
        return self.num_heads * self.v_head_dim

    @property
    def query(self) -> tuple[Linear | Norm, ...]:
        """What makes queries: down, norm and up, or one projection."""
        return self.parts[:-4]

    @property
    def keys_values(self) -> tuple[Linear, Norm, Linear]:
        """What makes keys and values: down, norm and up."""
        down, norm, up = self.parts[-4:-1]
        assert isinstance(down, Linear)
        assert isinstance(norm, Norm)
        assert isinstance(up, Linear)
        return down, norm, up

    @property
    def out(self) -> Linear:
        return list(self.linears())[-1]

    def tensors(self) -> Iterator[ParamTensor]:
        for part in self.parts:
            yield from part.tensors()

    def linears(self) -> Iterator[Linear]:
        for part in self.parts:
            if isinstance(part, Linear):
                yield part


@dataclass(frozen=True, slots=True)
class GatedMLP:
    """``down(act(gate(x)) * up(x))``, width ``intermediate``; ``projections`` = (gate, up, down) or, fused,
    (gate_up, down)."""

    intermediate: int
    activation: str
    projections: tuple[Linear, ...]

    @property
    def fused(self) -> bool:
        return len(self.projections) == 2

    def tensors(self) -> Iterator[ParamTensor]:
        for linear in self.projections:
            yield from linear.tensors()

    def linears(self) -> Iterator[Linear]:
        yield from self.projections


@dataclass(frozen=True, slots=True)
class PlainMLP:
    """``down(act(up(x)))``; ``projections`` = (up, down). ``dropout`` after ``down`` where the family has it, in the
    module ``dropout_module``."""

    intermediate: int
    activation: str
    projections: tuple[Linear, Linear]
    dropout: float = 0.0
    dropout_module: str = ""

    def tensors(self) -> Iterator[ParamTensor]:
        for linear in self.projections:
            yield from linear.tensors()

    def linears(self) -> Iterator[Linear]:
        yield from self.projections
