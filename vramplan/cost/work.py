"""What one token costs on one rank: arithmetic and memory traffic of a pass through the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from vramplan.cost.assumed import ELEMENTWISE_BYTES
from vramplan.facts.architecture import (
    Architecture,
    Attention,
    DecoderLayer,
    GatedMLP,
    LatentAttention,
    Linear,
    MixtureOfExperts,
    PlainMLP,
)
from vramplan.spec.run import RunSpec
from vramplan.spec.targets import fused_adapters, resolve_targets, saved_modules
from vramplan.spec.trainable import FullMethod, LoraMethod


@dataclass(frozen=True, slots=True)
class TokenWork:
    """One token's forward through the whole model: FLOP and bytes moved by element-wise kernels."""

    layer_flops: float
    """Matrix products with the layers' weights: 2 FLOP a weight."""
    attention_flops: float
    """Scores and their product with the values: 4 FLOP a (token, key, element), half of it where the mask is causal
    and the kernel skips what it hides."""
    head_flops: float
    adapter_flops: float
    """Matrix products with the adapters' factors."""
    layer_bytes: float
    head_bytes: float

    @property
    def forward_flops(self) -> float:
        return self.layer_flops + self.attention_flops + self.head_flops + self.adapter_flops


@dataclass(frozen=True, slots=True)
class TrainingFlops:
    """FLOP of one token's forward, backward and recomputation, by kind of kernel."""

    matmul: float
    attention: float

    @property
    def total(self) -> float:
        return self.matmul + self.attention


def token_work(run: RunSpec, architecture: Architecture) -> TokenWork:
    """The work of one token of ``run``'s sequences, forward, on an unsharded model."""
    layers = Counter(id(layer) for layer in architecture.layers)
    by_id = {id(layer): layer for layer in architecture.layers}
    hidden = architecture.hidden_size
    return TokenWork(
        layer_flops=sum(2 * n * _weight_numel(by_id[key]) for key, n in layers.items()),
        attention_flops=sum(n * _attention_flops(by_id[key], run) for key, n in layers.items()),
        head_flops=2 * architecture.head.weight_numel,
        adapter_flops=2 * adapter_numel(run, architecture),
        layer_bytes=sum(n * _layer_bytes(by_id[key], hidden, run) for key, n in layers.items()),
        head_bytes=ELEMENTWISE_BYTES["logit"] * architecture.vocab_size,
    )


def training_flops(work: TokenWork, *, full: bool, checkpointing: float) -> TrainingFlops:
    """FLOP of one token's training: 6 a weight for full training, 4 and the adapters' own with frozen weights.

    Backward is one more product for the input's gradient, and another for the weight's where it is trained;
    attention's is 2.5 forwards (FlashAttention recomputes the scores). ``checkpointing``: the share of the layers whose
    forward is repeated.
    """
    weights = work.layer_flops + work.head_flops
    matmul = weights * (3 if full else 2) + work.adapter_flops * 3
    attention = work.attention_flops * 3.5
    matmul += checkpointing * (work.layer_flops + work.adapter_flops)
    attention += checkpointing * work.attention_flops
    return TrainingFlops(matmul, attention)


def trainable_numel(run: RunSpec, architecture: Architecture) -> int:
    """Elements that the optimizer updates."""
    method = run.method
    if isinstance(method, LoraMethod):
        folded = _fused_adapter_numel(method, architecture)
        return adapter_numel(run, architecture) + folded + _saved_numel(method, architecture)
    return _trained_numel(method, architecture)


@lru_cache(maxsize=64)
def _saved_numel(method: LoraMethod, architecture: Architecture) -> int:
    whole = saved_modules(method, architecture)
    return sum(each.numel for each in architecture.named_tensors() if each.name.rpartition(".")[0] in whole)


@lru_cache(maxsize=64)
def _trained_numel(method: FullMethod, architecture: Architecture) -> int:
    count = architecture.num_layers
    return sum(tensor.numel for tensor in architecture.named_tensors() if method.trains(tensor.name, count))


def adapter_numel(run: RunSpec, architecture: Architecture) -> int:
    """Elements of adapters that tokens pass: ``r (in + out)`` for each linear that gets one, and DoRA's magnitudes."""
    return _adapter_numel(run.method, architecture) if isinstance(run.method, LoraMethod) else 0


@lru_cache(maxsize=64)
def _adapter_numel(asked: LoraMethod, architecture: Architecture) -> int:
    method = resolve_targets(asked, architecture).method
    return sum(
        method.r * (linear.in_features + linear.out_features) + (linear.out_features if method.use_dora else 0)
        for linear in adapted_linears(method, architecture)
    )


@lru_cache(maxsize=64)
def _fused_adapter_numel(method: LoraMethod, architecture: Architecture) -> int:
    """Elements of the adapters on routers' and experts' parameters; these are folded in once for all tokens."""
    adapted = resolve_targets(method, architecture).parameters
    blocks = (layer.feed_forward for layer in architecture.layers)
    return sum(
        each.down_numel + each.up_numel
        for block in blocks
        if isinstance(block, MixtureOfExperts)
        for each in fused_adapters(block, adapted, method.r)
    )


def adapted_linears(method: LoraMethod, architecture: Architecture) -> Iterator[Linear]:
    """Linears that PEFT would wrap."""
    return (linear for name, linear in architecture.named_linears() if method.adapts(name))


def _weight_numel(layer: DecoderLayer) -> int:
    """Weights that one token is multiplied with: of routed experts only those that it is sent to."""
    dense = sum(linear.weight_numel for linear in layer.linears())
    mixture = layer.feed_forward
    if not isinstance(mixture, MixtureOfExperts):
        return dense
    router, experts = mixture.router, mixture.experts
    scored = 0 if router.is_linear else router.in_features * router.num_experts
    return dense + scored + mixture.experts_per_token * 3 * experts.hidden_size * experts.intermediate


def _attention_flops(layer: DecoderLayer, run: RunSpec) -> float:
    """Scores and their product with the values, for one token; a window or chunk bounds the keys."""
    mixer = layer.mixer
    keys = run.seq_len
    if isinstance(mixer, LatentAttention):
        width = mixer.num_heads * (mixer.qk_head_dim + mixer.v_head_dim) / 2
    else:
        keys = min(keys, mixer.sliding_window or keys, mixer.chunk or keys)
        width = mixer.q_width
    causal = 1.0 if run.attention == "eager" else 0.5
    return 4 * keys * width * causal


def _layer_bytes(layer: DecoderLayer, hidden: int, run: RunSpec) -> float:
    """Bytes that element-wise kernels move in one layer's forward, for one token."""
    cost = ELEMENTWISE_BYTES
    total = 2.0 * cost["residual"] * hidden
    total += sum(cost["norm_fused" if norm.kind == "layer" else "norm"] * norm.width for norm in layer.norms)
    total += _mixer_bytes(layer.mixer, run) + _feed_forward_bytes(layer.feed_forward, hidden)
    return total * (2 if run.precision == "fp32" else 1)


def _mixer_bytes(mixer: Attention | LatentAttention, run: RunSpec) -> float:
    heads = mixer.num_heads + (1 if isinstance(mixer, LatentAttention) else mixer.num_kv_heads)
    scores = ELEMENTWISE_BYTES["score"] * mixer.num_heads * run.seq_len if run.attention == "eager" else 0
    return ELEMENTWISE_BYTES["rotary"] * mixer.rotary_dim * heads + scores


def _feed_forward_bytes(block: GatedMLP | PlainMLP | MixtureOfExperts, hidden: int) -> float:
    cost = ELEMENTWISE_BYTES
    if isinstance(block, PlainMLP):
        return cost["plain"] * block.intermediate
    if isinstance(block, GatedMLP):
        return cost["gated"] * block.intermediate
    routed = block.experts_per_token * (cost["gated"] * block.experts.intermediate + cost["residual"] * hidden)
    return routed + (cost["gated"] * block.shared.intermediate if block.shared is not None else 0)
