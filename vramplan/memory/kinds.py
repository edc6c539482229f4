"""Which layers of a model keep the same bytes, and which of each kind are run on the tape."""

from __future__ import annotations

import itertools
from collections.abc import Hashable

from vramplan.facts.architecture import Architecture
from vramplan.memory.gathers import GatherLimits
from vramplan.memory.quantized import packed_numel
from vramplan.spec.trainable import FullMethod, LoraMethod, Method


def layer_kind(architecture: Architecture, method: Method, index: int) -> Hashable:
    """Layers of one kind keep the same bytes. The first layer is of its own kind: its input is also held by the
    model's forward, and with a frozen base nothing before its first adapter needs a gradient. Nor are layers with
    different adapters or frozen weights of one kind, or layers above and below the first that is trained."""
    adapted: tuple[str, ...] = ()
    if isinstance(method, FullMethod) and method.freezes:
        return architecture.layers[index], index == 0, *_trained_in(architecture, method, index)
    if isinstance(method, LoraMethod):
        prefix = f"{architecture.layer_prefix}.{index}."
        layer = architecture.layers[index]
        adapted = tuple(linear.name for linear in layer.linears() if method.adapts(f"{prefix}{linear.name}"))
    return architecture.layers[index], index == 0, adapted


def _trained_in(architecture: Architecture, method: FullMethod, index: int) -> tuple[tuple[str, ...], bool]:
    """The tensors of a layer that are trained, and whether its input needs a gradient."""
    count, prefix = architecture.num_layers, f"{architecture.layer_prefix}.{index}."
    names = tuple(tensor.name for tensor in architecture.layers[index].tensors())
    below = itertools.takewhile(lambda each: not each.name.startswith(prefix), architecture.named_tensors())
    return (
        tuple(name for name in names if method.trains(f"{prefix}{name}", count)),
        any(method.trains(tensor.name, count) for tensor in below),
    )


def layers_shown(keys: list[Hashable], near_turn: int, near_start: int) -> frozenset[int]:
    """The layers that are run: first and last of each kind; under ZeRO-3 also those whose weights are kept over the
    turn from forward to backward, and those at whose backward less than elsewhere is left to gather."""
    first: dict[Hashable, int] = {}
    last: dict[Hashable, int] = {}
    for index, key in enumerate(keys):
        first.setdefault(key, index)
        last[key] = index
    near = *range(min(near_start, len(keys))), *range(max(0, len(keys) - near_turn), len(keys))
    return frozenset({*first.values(), *last.values(), *near})


def layers_near_ends(architecture: Architecture, limits: GatherLimits, packed_width: int = 0) -> tuple[int, int]:
    """Layers at the end of the model whose weights may be there over the turn: as many as prefetching may run ahead
    (``max_live``), as a reuse distance covers there and back, one more and one of each kind of layer; and as many at
    its start without the reuse distance. ``packed_width``: bytes of the elements as which weights in 4 bits lie; 0:
    there are none."""
    numel = min(sum(tensor.numel for tensor in layer.tensors()) for layer in set(architecture.layers))
    numel = packed_numel(numel, packed_width) if packed_width else numel
    ahead = limits.max_live_numel // numel + 1 + len(set(architecture.layers))
    return ahead + limits.max_reuse_numel // (2 * numel), ahead
