"""Tensor parallelism as DeepSpeed's AutoTP trains it: a model of which each rank has a share of every linear.

Read in deepspeed 0.19.8 (module_inject/auto_tp.py and layers.py) with the plans of transformers 5.17
(``base_model_tp_plan``): what goes into heads and into the MLP is cut by its outputs (``LinearLayer``), what comes out
of them by its inputs (``LinearAllreduce``), the head by its outputs, which are gathered
(``GatherFromTensorParallelRegion``). Embeddings, norms and the residual stream are whole on every rank. All-reduces
work in place.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vramplan.facts.architecture import Architecture, Attention, DecoderLayer, GatedMLP, Linear, PlainMLP
from vramplan.spec.layout import shard

FAMILIES = frozenset(
    [
        "gemma",
        "gemma2",
        "gpt_neox",
        "granite",
        "llama",
        "mistral",
        "olmo",
        "opt",
        "phi",
        "qwen2",
        "qwen2_moe",
        "qwen3",
        "smollm3",
        "starcoder2",
    ]
)
"""Families whose queries, keys, values and dense MLPs are cut so, compared with measurements or simulations. Routed and
shared experts stay whole on every rank."""
TIED = frozenset(["gemma", "gemma2", "opt"])
"""Those of them whose head is cut and its table not, though both were one matrix; else both are cut by the vocabulary
with a loss of their own (``vocab_parallel_lm_head``)."""


def split(architecture: Architecture, degree: int) -> Architecture:
    """What one of ``degree`` ranks has of a model; products are by ``torch.matmul``, biases added after them."""
    if degree == 1:
        return architecture
    shares = {layer: _layer(layer, degree) for layer in set(architecture.layers)}
    return replace(
        architecture,
        layers=tuple(shares[layer] for layer in architecture.layers),
        head=_by_outputs(architecture.head, degree),
    )


def why_not(architecture: Architecture, degree: int) -> str:
    """Why the shares of a model are not counted; empty where they are."""
    if degree == 1:
        return ""
    if architecture.family not in FAMILIES:
        return f"tensor parallelism of the {architecture.family} family"
    if architecture.tied_embeddings and architecture.family not in TIED:
        return "tensor parallelism with a head tied to the embedding"
    divided = {architecture.vocab_size}
    for layer in set(architecture.layers):
        mixer, block = layer.mixer, layer.feed_forward
        assert isinstance(mixer, Attention)
        divided |= {mixer.num_heads, mixer.num_kv_heads}
        if isinstance(block, GatedMLP | PlainMLP):
            divided.add(block.intermediate)
    uneven = sorted(number for number in divided if number % degree)
    return f"tensor parallelism in uneven shares ({uneven[0]} by {degree})" if uneven else ""


def _layer(layer: DecoderLayer, degree: int) -> DecoderLayer:
    return replace(layer, parts=tuple(_part(part, degree) for part in layer.parts))


def _part(part: Any, degree: int) -> Any:
    if isinstance(part, Attention):
        heads, kv_heads = shard(part.num_heads, degree), shard(part.num_kv_heads, degree)
        projections = _cut(part.projections, degree)
        return replace(part, num_heads=heads, num_kv_heads=kv_heads, projections=projections)
    if isinstance(part, GatedMLP):
        return replace(part, intermediate=shard(part.intermediate, degree), projections=_cut(part.projections, degree))
    if isinstance(part, PlainMLP):
        inward, outward = _cut(part.projections, degree)
        return replace(part, intermediate=shard(part.intermediate, degree), projections=(inward, outward))
    return part


def _cut(projections: tuple[Linear, ...], degree: int) -> tuple[Linear, ...]:
    """All but the last by their outputs, the last by its inputs."""
    *inward, outward = projections
    last = replace(outward, in_features=shard(outward.in_features, degree), by_matmul=True)
    return *(_by_outputs(each, degree) for each in inward), last


def _by_outputs(linear: Linear, degree: int) -> Linear:
    return replace(linear, out_features=shard(linear.out_features, degree), by_matmul=True, shares_input=True)
