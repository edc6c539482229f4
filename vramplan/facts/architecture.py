"""A model as a sequence of typed blocks; each block lists its parameter tensors.

``facts/families/`` builds these from a ``config.json``; ``memory/blocks/`` says what each block keeps for
backward; neither knows the other. Names of tensors are those of ``model.named_parameters()`` in the installed
transformers, in its order (the order decides which gradient comes first).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property


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
        product = 1
        for size in self.shape:
            product *= size
        return product


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

    def tensors(self) -> Iterator[ParamTensor]:
        shape = (self.in_features, self.out_features) if self.conv1d else (self.out_features, self.in_features)
        yield ParamTensor(f"{self.name}.weight", shape, self.role)
        if self.bias:
            yield ParamTensor(f"{self.name}.bias", (self.out_features,), self.role)

    @property
    def weight_numel(self) -> int:
        return self.in_features * self.out_features


@dataclass(frozen=True, slots=True)
class Norm:
    """A normalisation over ``width`` elements. ``kind``: ``rms`` (HF's Python RMSNorm: several ops, an fp32 copy)
    or ``layer`` (``torch.nn.LayerNorm``: one fused op). ``affine`` False: no parameters (OLMo)."""

    name: str
    width: int
    kind: str = "rms"
    bias: bool = False
    affine: bool = True

    def tensors(self) -> Iterator[ParamTensor]:
        if self.affine:
            yield ParamTensor(f"{self.name}.weight", (self.width,), Role.NORM)
            if self.bias:
                yield ParamTensor(f"{self.name}.bias", (self.width,), Role.NORM)


@dataclass(frozen=True, slots=True)
class Embedding:
    """A lookup table ``num_embeddings x width``."""

    name: str
    num_embeddings: int
    width: int

    def tensors(self) -> Iterator[ParamTensor]:
        yield ParamTensor(f"{self.name}.weight", (self.num_embeddings, self.width), Role.EMBEDDING)


@dataclass(frozen=True, slots=True)
class Attention:
    """Softmax attention with ``num_heads`` query heads and ``num_kv_heads`` key/value heads of ``head_dim``.

    ``projections`` in registration order: three (q, k, v) or one fused, then the output projection last.
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

    @property
    def q_width(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def fused_qkv(self) -> bool:
        return len(self.projections) == 2

    @property
    def out(self) -> Linear:
        return self.projections[-1]

    def tensors(self) -> Iterator[ParamTensor]:
        for linear in self.projections:
            yield from linear.tensors()
        for norm in (self.q_norm, self.k_norm):
            if norm is not None:
                yield from norm.tensors()

    def linears(self) -> Iterator[Linear]:
        yield from self.projections


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
    """``down(act(up(x)))``; ``projections`` = (up, down). ``dropout`` after ``down`` where the family has it."""

    intermediate: int
    activation: str
    projections: tuple[Linear, Linear]
    dropout: float = 0.0

    def tensors(self) -> Iterator[ParamTensor]:
        for linear in self.projections:
            yield from linear.tensors()

    def linears(self) -> Iterator[Linear]:
        yield from self.projections


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """One decoder layer. ``parts`` in registration order, each an attention, an MLP or a norm; the residual
    arrangement is ``sequential`` (pre-norm attention, then pre-norm MLP) or ``parallel``."""

    parts: tuple[Attention | GatedMLP | PlainMLP | Norm, ...]
    residual: str = "sequential"
    residual_dropout: float = 0.0

    @property
    def attention(self) -> Attention:
        return next(part for part in self.parts if isinstance(part, Attention))

    @property
    def mlp(self) -> GatedMLP | PlainMLP:
        return next(part for part in self.parts if isinstance(part, GatedMLP | PlainMLP))

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
    layer_prefix: str = "model.layers"
    embedding_dropout: float = 0.0
    embedding_scaled: bool = False
    """The embedding output is multiplied by a constant (Gemma, Granite): one more tensor of the residual."""
    logits_softcap: bool = False
    """``softcap * tanh(logits / softcap)`` (Gemma-2): three more tensors of the logits' size."""
    logits_scaled: bool = False
    """The logits are multiplied or divided by a constant (Granite, Cohere): one more tensor of the logits' size."""
    extra: dict[str, object] = field(default_factory=dict, compare=False)

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def named_tensors(self) -> Iterator[ParamTensor]:
        """Every unique parameter tensor by its full name, in registration order (a tied head is left out)."""
        for embedding in self.embeddings:
            yield from embedding.tensors()
        for index, layer in enumerate(self.layers):
            for tensor in layer.tensors():
                yield ParamTensor(f"{self.layer_prefix}.{index}.{tensor.name}", tensor.shape, tensor.role)
        if self.final_norm is not None:
            yield from self.final_norm.tensors()
        if not self.tied_embeddings:
            yield from self.head.tensors()

    def named_linears(self) -> Iterator[tuple[str, Linear]]:
        """Every dense projection of the layers by its full module name (not the head)."""
        for index, layer in enumerate(self.layers):
            for linear in layer.linears():
                yield f"{self.layer_prefix}.{index}.{linear.name}", linear

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
