"""What would make a run fit that does not: each way is found by search and named by the number to change.

Ways that leave the training as it is come first (layout, kernels, more devices), then those that change it (shorter
sequences, adapters instead of full weights, a smaller optimizer).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Literal, TypeVar

from vramplan.errors import VramplanError
from vramplan.facts.architecture import Architecture
from vramplan.facts.device import Node
from vramplan.facts.devices import all_devices, find_device
from vramplan.memory.ledger import Estimate
from vramplan.search.choose import search
from vramplan.search.lean import fewest_bytes, leanest_fit
from vramplan.spec.layout import Layout
from vramplan.spec.run import RunSpec
from vramplan.spec.trainable import LoraMethod
from vramplan.units import MIB, format_bytes, parse_bytes

Value = TypeVar("Value")
Search = Callable[[RunSpec, Node, Architecture], "Remedy | None"]

MAX_REMEDIES = 5
_MAX_NODES = 128
_SEQ_STEP = 64
"""Sequence lengths are tried in steps of as many tokens: kernels like multiples of it."""

PLANNED_FIELDS = (
    "micro_batch_size",
    "activation_checkpointing",
    "zero.stage",
    "zero.offload_optimizer",
    "zero.offload_param",
)
"""What the planner decides where the user leaves it open."""


@dataclass(frozen=True, slots=True)
class Remedy:
    """One way to make it fit."""

    changes: tuple[tuple[str, Any], ...]
    """Fields of the spec with the values to give them."""
    used_peak_bytes: int
    """Of one rank, with the changes made and what is left open chosen anew."""
    changes_training: bool = False
    """Whether what is learnt changes, not only where the bytes lie."""

    def __str__(self) -> str:
        text = " and ".join(f"{name} {value}" for name, value in self.changes)
        return f"{text} ({format_bytes(self.used_peak_bytes)})"


def remedies(run: RunSpec, node: Node, architecture: Architecture) -> tuple[Remedy, ...]:
    """Ways to make ``run`` fit on ``node`` where nothing does; at most ``MAX_REMEDIES``."""
    opened = list(_opened(run, node, architecture))
    if opened:
        return tuple(opened[:MAX_REMEDIES])
    ways = (way for find in _SEARCHES if (way := _found(find, run, node, architecture)) is not None)
    return tuple(_as_chosen(way, run, node, architecture) for way in islice(ways, MAX_REMEDIES))


def get_field(run: RunSpec, name: str) -> Any:
    """A field of the spec by its dotted name."""
    section, dot, key = name.partition(".")
    return getattr(getattr(run, section), key) if dot else getattr(run, section)


def with_field(run: RunSpec, name: str, value: Any) -> RunSpec:
    """``run`` with one field, by its dotted name, set."""
    section, dot, key = name.partition(".")
    if not dot:
        return run.model_copy(update={section: value})
    if section == "layout":
        return run.model_copy(update={section: replace(run.layout or Layout(), **{key: value})})
    return run.model_copy(update={section: getattr(run, section).model_copy(update={key: value})})


def applied(run: RunSpec, node: Node, changes: Sequence[tuple[str, Any]]) -> tuple[RunSpec, Node]:
    """The run and the node with a remedy's changes made."""
    for name, value in changes:
        if name in _ON_NODE:
            field, read = _ON_NODE[name]
            node = replace(node, **{field: read(value)})
        elif name == "method.kind":
            run = run.model_copy(update={"method": _adapters_of_kind(run, value)})
        else:
            run = with_field(run, name, value)
    return run, node


_ON_NODE: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "hardware.gpu": ("device", find_device),
    "hardware.gpus_per_node": ("gpus_per_node", int),
    "hardware.nodes": ("num_nodes", int),
    "hardware.host_memory": ("host_memory_bytes", parse_bytes),
    "hardware.memory_cap": ("memory_cap_bytes", parse_bytes),
}


def _adapters_of_kind(run: RunSpec, kind: Literal["lora", "qlora"]) -> LoraMethod:
    """Adapters with the numbers that the run gives them, if it has any."""
    return run.method.model_copy(update={"kind": kind}) if isinstance(run.method, LoraMethod) else LoraMethod(kind=kind)


def with_open(run: RunSpec, names: Sequence[str]) -> RunSpec:
    """``run`` with these fields left to the planner; accumulation too, where it follows from the micro-batch."""
    for name in names:
        run = with_field(run, name, None)
        if name == "micro_batch_size" and run.global_batch_size is not None:
            run = run.model_copy(update={"grad_accum_steps": None})  # the two share one number
    return run


def _opened(run: RunSpec, node: Node, architecture: Architecture) -> Iterator[Remedy]:
    """Leaving the planner one of the fields that the user fixed; where no one is enough, all of them."""
    fixed = _fixed(run)
    single = [way for name in fixed if (way := _reopen(run, (name,), node, architecture)) is not None]
    yield from single
    if not single and len(fixed) > 1 and (way := _reopen(run, fixed, node, architecture)) is not None:
        yield way


def _found(find: Search, run: RunSpec, node: Node, architecture: Architecture) -> Remedy | None:
    """What ``find`` gives with all that the user fixed; else with that left to the planner, and what is given up of it
    named beside."""
    fixed = _fixed(run)
    way = find(run, node, architecture)
    if way is not None or not fixed:
        return way
    way = find(with_open(run, PLANNED_FIELDS), node, architecture)
    if way is None:
        return None
    changed, cured = applied(run, node, way.changes)
    given_up = _reopen(changed, fixed, cured, architecture)
    if given_up is None:
        return None
    return replace(way, changes=way.changes + given_up.changes, used_peak_bytes=given_up.used_peak_bytes)


def _as_chosen(way: Remedy, run: RunSpec, node: Node, architecture: Architecture) -> Remedy:
    """``way`` with the bytes of the plan that is made with it; it was found by the leanest."""
    changed, cured = applied(run, node, way.changes)
    answer = search(changed, cured, architecture)
    return replace(way, used_peak_bytes=answer.estimate.used_peak_bytes) if answer.fits else way


def _fixed(run: RunSpec) -> list[str]:
    return [name for name in PLANNED_FIELDS if get_field(run, name) is not None]


def _reopen(run: RunSpec, names: Sequence[str], node: Node, architecture: Architecture) -> Remedy | None:
    try:
        answer = search(with_open(run, names), node, architecture)
    except VramplanError:  # what is left fixed cannot be combined with anything
        return None
    if not answer.fits:
        return None
    closed = answer.best.run
    changed = tuple(
        (name, get_field(closed, name)) for name in names if get_field(closed, name) != get_field(run, name)
    )
    return Remedy(changed, answer.estimate.used_peak_bytes)


def _small_evaluation(run: RunSpec, node: Node, architecture: Architecture) -> Remedy | None:
    if (run.training.eval_micro_batch_size or 1) == 1:
        return None
    return _by_field(run, "training.eval_micro_batch_size", 1, node, architecture)


def _whole_reductions(run: RunSpec, node: Node, architecture: Architecture) -> Remedy | None:
    """Muon goes under ZeRO-3 only so (``_muon_reduces_whole`` in legality.py)."""
    if run.optimizer.kind != "muon" or not run.zero.reduce_scatter or run.zero.stage not in (None, 3):
        return None
    return _by_field(run, "zero.reduce_scatter", False, node, architecture)


def _shared_sequences(run: RunSpec, node: Node, architecture: Architecture) -> Remedy | None:
    """The fewest ranks of a node that share each sequence."""
    if run.layout is not None or run.engine == "torch":
        return None
    for sp in (degree for degree in range(2, node.gpus_per_node + 1) if node.gpus_per_node % degree == 0):
        dp = node.world_size // sp
        found = _try_fit(run.model_copy(update={"layout": Layout(dp=dp, sp=sp)}), node, architecture)
        if found is not None:
            return Remedy((("layout.dp", dp), ("layout.sp", sp)), found.used_peak_bytes)
    return None


def _fused_loss(run: RunSpec, node: Node, architecture: Architecture) -> Remedy | None:
    if run.loss == "liger" or node.device.kind == "cpu":
        return None
    return _by_field(run, "loss", "liger", node, architecture)


def _adapters(run: RunSpec, node: Node, architecture: Architecture) -> Remedy | None:
    """LoRA instead of full training, QLoRA instead of LoRA."""
    for kind in _LIGHTER_KINDS[run.method.kind]:
        found = _try_fit(run.model_copy(update={"method": _adapters_of_kind(run, kind)}), node, architecture)
        if found is not None:
            return Remedy((("method.kind", kind),), found.used_peak_bytes, changes_training=True)
    return None


_LIGHTER_KINDS: dict[str, tuple[Literal["lora", "qlora"], ...]] = {
    "full": ("lora", "qlora"),
    "lora": ("qlora",),
    "qlora": (),
}


def _small_optimizer(run: RunSpec, node: Node, architecture: Architecture) -> Remedy | None:
    if run.method.kind != "full" or run.optimizer.kind == "adamw_8bit" or node.device.kind == "cpu":
        return None
    way = _by_field(run, "optimizer.kind", "adamw_8bit", node, architecture)
    return None if way is None else replace(way, changes_training=True)


def _shorter_sequences(run: RunSpec, node: Node, architecture: Architecture) -> Remedy | None:
    lengths = range(_SEQ_STEP, run.seq_len, _SEQ_STEP)

    def fit(length: int) -> Estimate | None:
        return _try_fit(run.model_copy(update={"seq_len": length}), node, architecture)

    # the largest length that fits is the first that fits of the lengths from the longest on
    found = _first_that_fits(lengths[::-1], fit)
    return None if found is None else Remedy((("seq_len", found[0]),), found[1].used_peak_bytes, changes_training=True)


def _more_devices(run: RunSpec, node: Node, architecture: Architecture) -> Remedy | None:
    """The smallest number of devices, within one node first; batch and layout may forbid some numbers."""
    if run.layout is not None:
        return None
    full_node = max(8, node.gpus_per_node)
    counts = [(each, 1) for each in range(node.gpus_per_node + 1, full_node + 1)] if node.num_nodes == 1 else []
    counts += [(full_node, nodes) for nodes in range(max(2, node.num_nodes + 1), _MAX_NODES + 1)]
    dp_allows = [count for count in counts if (run.global_batch_size or 0) % (count[0] * count[1]) == 0]

    def fit(count: tuple[int, int]) -> Estimate | None:
        return _try_fit(run, replace(node, gpus_per_node=count[0], num_nodes=count[1]), architecture)

    found = _first_that_fits(dp_allows, fit)
    if found is None:
        return None
    (gpus, nodes), fitting = found
    changes: tuple[tuple[str, Any], ...] = (("hardware.gpus_per_node", gpus),)
    if nodes != node.num_nodes:
        changes += (("hardware.nodes", nodes),)
    return Remedy(changes, fitting.used_peak_bytes)


def _more_memory(run: RunSpec, node: Node, architecture: Architecture) -> Remedy | None:
    """The smallest host memory or cap, in whole MiB, that would do, where it is one of these that binds."""
    try:
        lean = fewest_bytes(run, node, architecture)
    except VramplanError:
        return None
    if lean.used_peak_bytes <= lean.capacity_bytes:
        return Remedy((("hardware.host_memory", format_size(lean.host_bytes_per_node)),), lean.used_peak_bytes)
    if node.memory_cap_bytes is None or lean.used_peak_bytes > node.device.usable_bytes:
        return None
    return Remedy((("hardware.memory_cap", format_size(lean.used_peak_bytes)),), lean.used_peak_bytes)


def _larger_device(run: RunSpec, node: Node, architecture: Architecture) -> Remedy | None:
    """The catalogue's smallest device of the same kind on which it fits."""
    if node.device.kind == "cpu" or node.memory_cap_bytes is not None:
        return None
    larger = sorted(
        (each for each in all_devices() if each.kind == node.device.kind and each.usable_bytes > node.capacity_bytes),
        key=lambda each: each.usable_bytes,
    )
    found = _first_that_fits(larger, lambda device: _try_fit(run, replace(node, device=device), architecture))
    return None if found is None else Remedy((("hardware.gpu", found[0].name),), found[1].used_peak_bytes)


def format_size(num_bytes: int) -> str:
    """Bytes as a size that ``parse_bytes`` reads back to no less, e.g. ``12345MiB``."""
    return f"{-(-num_bytes // MIB)}MiB"


_SEARCHES: tuple[Search, ...] = (
    _small_evaluation,
    _whole_reductions,
    _fused_loss,
    _shared_sequences,
    _more_devices,
    _more_memory,
    _larger_device,
    _shorter_sequences,
    _adapters,
    _small_optimizer,
)


def _by_field(run: RunSpec, name: str, value: Any, node: Node, architecture: Architecture) -> Remedy | None:
    found = _try_fit(with_field(run, name, value), node, architecture)
    return None if found is None else Remedy(((name, value),), found.used_peak_bytes)


def _try_fit(run: RunSpec, node: Node, architecture: Architecture) -> Estimate | None:
    """An estimate of ``run`` that fits; None where none does or the run cannot be made."""
    try:
        return leanest_fit(run, node, architecture)
    except VramplanError:
        return None


def _first_that_fits(values: Sequence[Value], fit: Callable[[Value], Estimate | None]) -> tuple[Value, Estimate] | None:
    """The first of ``values`` that fits, where all after one that fits do too (bisection)."""
    low, high, best = 0, len(values), None
    while low < high:
        middle = (low + high) // 2
        found = fit(values[middle])
        if found is None:
            low = middle + 1
        else:
            high, best = middle, (values[middle], found)
    return best
