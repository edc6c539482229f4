"""Which depths of a model to trace so that its full depth follows from them exactly; where none do, why.

Layers are told apart by what their code can see: classes, parameters and plain attributes, and their entries in the
config's lists. If they come in cycles (of one layer, or of sliding and full attention in turn), a model cut to fewer
layers runs the same code per cycle. What DeepSpeed carries from layer to layer comes round to the same state once
every ``period`` of cycles, if each of its limits (``_limits``) is either passed within the period or by no depth: a
bucket that is sent is empty, a window that looks ahead no further than a period sees the same everywhere inside.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch

from vramplan.emit.deepspeed import ds_config
from vramplan.rank.model import add_adapters, has_own_code, transformers_config, weight_dtype
from vramplan.spec.layout import Layout, shard
from vramplan.spec.run import RunSpec
from vramplan.spec.trainable import FullMethod, LoraMethod

DEPTHS = 3
"""Two depths give the law, the third has to follow from it."""
WORTH_FRAC = 0.6
"""Layers traced at all depths together, of the full model's, up to which tracing them is worth it."""
_COUNT_NAMES = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_FALLBACK_BUCKET_NUMEL = 500_000_000
"""engine.py ``buffered_allreduce_fallback``: elements that ZeRO 0 reduces at once."""
_ALIGNMENT = 4
"""stage_1_and_2.py and bf16_optimizer.py pad flat buffers to twice the ranks; twice more to be safe with bytes."""
_NESTING = 10
"""Modules that stand around a weight, at most: beside leaf modules each of them counts all that is in it."""


class NotByDepth(Exception):
    """Why the trace of the full depth is not taken from lesser depths."""


@dataclass(frozen=True, slots=True)
class DepthPlan:
    """The depths ``first``, ``first + period`` and so on; all lead to ``num_layers`` in whole periods."""

    num_layers: int
    first: int
    period: int

    def depths(self, attempt: int = 0) -> tuple[int, ...]:
        """The depths to compare; each further attempt starts one period deeper."""
        start = self.first + attempt * self.period
        return tuple(start + step * self.period for step in range(DEPTHS))

    def periods_beyond(self, depth: int) -> int:
        """How many periods the full depth has more than this one."""
        return (self.num_layers - depth) // self.period

    def is_worth(self, attempt: int = 0) -> bool:
        """Whether all the depths traced up to this attempt take clearly less than the full depth."""
        layers = sum({depth for number in range(attempt + 1) for depth in self.depths(number)})
        return layers <= WORTH_FRAC * self.num_layers


@dataclass(frozen=True, slots=True)
class _Cycle:
    """From layer ``start`` on the layers repeat every ``length``, ``num_layers`` in all."""

    num_layers: int
    start: int
    length: int


def plan_depths(run: RunSpec, layout: Layout) -> DepthPlan:
    """Which depths of a closed run to trace; call it outside of any mode.

    Raises:
        NotByDepth: the full depth has to be traced.
    """
    _check_kind(run, layout)
    cycle = _cycle_of(run)
    first_counted = cycle.start + cycle.length
    counts = [_count(at_depth(run, first_counted + step * cycle.length)) for step in range(2)]
    times = _cycles_in_period(run, layout, cycle, *counts)
    period = times * cycle.length
    first = cycle.start + max(2 * period + cycle.length, _cycles_that_hold_ends(run, layout, *counts) * cycle.length)
    first += max(0, _cycles_looked_ahead(run, layout, cycle, *counts) - times) * cycle.length
    first += (cycle.num_layers - first) % period
    plan = DepthPlan(cycle.num_layers, first, period)
    if not plan.is_worth():
        raise NotByDepth(f"instead of {cycle.num_layers} layers at least {sum(plan.depths())} would have to be traced")
    return plan


def at_depth(run: RunSpec, num_layers: int) -> RunSpec:
    """The run with its model cut to its first layers."""
    fields = dict(run.model_config_fields or {})
    inner = next((name for name in ("text_config",) if isinstance(fields.get(name), Mapping)), None)
    if inner is not None:
        fields[inner] = _cut(fields[inner], num_layers)
    else:
        fields = _cut(fields, num_layers)
    return run.model_copy(update={"model_config_fields": fields})


def _cut(fields: Mapping[str, Any], num_layers: int) -> dict[str, Any]:
    name = next((name for name in _COUNT_NAMES if name in fields), None)
    if name is None:
        raise NotByDepth("the model's config does not say how many layers it has")
    full = fields[name]
    found = {
        key: value[:num_layers] if isinstance(value, list | tuple) and len(value) == full else value
        for key, value in fields.items()
    }
    return {**found, name: num_layers}


def _check_kind(run: RunSpec, layout: Layout) -> None:
    """What may treat one layer otherwise than the next, or has not been tried."""
    fields = run.model_config_fields or {}
    method = run.method
    if has_own_code(fields.get("model_type", ""), fields):
        raise NotByDepth("code that comes with the model may do anything at any layer")
    if layout.sp > 1 or layout.tp > 1 or layout.pp > 1 or layout.ep > 1:
        raise NotByDepth("only data-parallel layouts are followed by depth")
    if run.engine != "deepspeed" and layout.world_size > 1:
        raise NotByDepth("DDP cuts the model's gradients into buckets of its own")
    if run.zero.round_robin_gradients:
        raise NotByDepth("round-robin gradients deal the layers out in another order at every depth")
    if method.kind == "qlora":
        raise NotByDepth("4-bit weights are traced in full")
    if isinstance(method, LoraMethod) and method.target_modules != "all-linear":
        targets = method.target_modules
        if isinstance(targets, str) or any("." in target for target in targets):
            raise NotByDepth("the adapters' targets may name single layers")
    if isinstance(method, FullMethod) and method.freezes:
        raise NotByDepth("single layers may be frozen")


def _cycle_of(run: RunSpec) -> _Cycle:
    """How the layers repeat to the end, whichever depth the model is cut to: the way that shows soonest."""
    config = transformers_config(run).get_text_config()
    numbers = list(range(config.num_hidden_layers))
    lists = [
        name
        for name, value in config.to_dict().items()
        # a list that names every layer (Llama 4's ``moe_layers``) tells none from another
        if isinstance(value, list) and len(value) == len(numbers) and value != numbers
    ]
    full = _layers_of(run, lists)
    every = run.checkpoint_every if run.activation_checkpointing == "full" else 1  # recomputed layers come in turn too
    starts = {length: _start_of_cycles(full, length) for length in range(every, len(full) // 2 + 1, every)}
    found = [(start + 2 * length, start, length) for length, start in starts.items() if start is not None]
    if not found:
        raise NotByDepth("its layers do not come in cycles")
    _, start, length = min(found)
    for depth in (start + length, start + 2 * length):
        if depth >= len(full) or _layers_of(at_depth(run, depth), lists) != full[:depth]:
            raise NotByDepth(f"cut to {depth} layers the model does not have its own first layers")
    return _Cycle(len(full), start, length)


def _start_of_cycles(layers: list[Any], length: int) -> int | None:
    """The layer from which each equals the one ``length`` before; None where that leaves fewer than two cycles."""
    start = len(layers) - length
    while start and layers[start - 1] == layers[start - 1 + length]:
        start -= 1
    return start if len(layers) - start >= 2 * length else None


def _layers_of(run: RunSpec, lists: Sequence[str]) -> list[Any]:
    """What tells each decoder layer from others, in order; ``lists``: fields of the config with an entry a layer."""
    config = transformers_config(run)
    text = config.get_text_config()
    model = _on_meta(run, config)
    num_layers = text.num_hidden_layers
    stacks = [
        module for module in model.modules() if isinstance(module, torch.nn.ModuleList) and len(module) == num_layers
    ]
    if len(stacks) != 1:
        raise NotByDepth(f"the model has {len(stacks)} stacks of {num_layers} layers")
    return [
        (tuple(str(getattr(text, name)[index]) for name in lists), tuple(_seen_in(layer, index)))
        for index, layer in enumerate(stacks[0])
    ]


def _seen_in(layer: torch.nn.Module, index: int) -> Iterator[Any]:
    """Classes, tensors' shapes and plain attributes of a layer's modules; its own number left out."""
    for name, module in layer.named_modules():
        tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        yield name, type(module).__qualname__, tuple((key, tuple(each.shape), each.dtype) for key, each in tensors)
        for key, value in sorted(vars(module).items()):
            is_own_number = "layer" in key and value in (index, index + 1) and not isinstance(value, bool)
            if isinstance(value, bool | int | float | str | tuple | None) and not is_own_number:
                yield name, key, value


def _on_meta(run: RunSpec, config: Any) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    with torch.device("meta"), no_init_weights():
        model: torch.nn.Module = AutoModelForCausalLM.from_config(config, dtype=weight_dtype(run))
    return model


@dataclass(frozen=True, slots=True)
class _Numel:
    """Elements of a model's parameters, and of those trained."""

    total: int
    trained: int
    outside_leaves: int
    """Of ``total``, without blocks that ZeRO-3 gathers as one module."""


def _count(run: RunSpec) -> _Numel:
    model = _on_meta(run, transformers_config(run))
    if isinstance(run.method, LoraMethod):
        with torch.device("meta"):
            model = add_adapters(model, run.method)
    params = list(model.parameters())
    in_leaves = {id(param) for leaf in _leaves(model) for param in leaf.parameters()}
    return _Numel(
        sum(param.numel() for param in params),
        sum(param.numel() for param in params if param.requires_grad),
        sum(param.numel() for param in params if id(param) not in in_leaves),
    )


def _leaves(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Modules that ZeRO-3 takes as one with all that is in them: DeepSpeed's default classes of experts."""
    from deepspeed.runtime.zero.leaf_module_config import DeepSpeedZeroLeafModuleConfig
    from deepspeed.utils.z3_leaf_module import apply_zero_leaf_module_config, get_z3_leaf_modules

    apply_zero_leaf_module_config(model, DeepSpeedZeroLeafModuleConfig())
    return list(get_z3_leaf_modules(model))


def _cycles_in_period(run: RunSpec, layout: Layout, cycle: _Cycle, shallow: _Numel, deeper: _Numel) -> int:
    """After how many cycles what the engine carries along comes round to the same state."""
    ranks = layout.zero_degree
    each, full = _more(shallow, deeper), _full(cycle, shallow, deeper)
    times = 1
    for limit, here, everywhere in _limits(run, layout, each, full):
        if everywhere > limit:
            times = max(times, -(-limit // max(here, 1)))
    if run.zero.stage != 3 and ranks > 1:
        aligned = _ALIGNMENT * ranks
        whole = aligned // math.gcd(aligned, each.trained)
        times = math.lcm(-(-times // whole) * whole, ranks)  # each rank's partition grows by whole cycles
    return times


def _more(shallow: _Numel, deeper: _Numel) -> _Numel:
    """What one cycle has."""
    return _Numel(*(more - less for less, more in zip(astuple(shallow), astuple(deeper), strict=True)))


def _full(cycle: _Cycle, shallow: _Numel, deeper: _Numel) -> _Numel:
    """What the full model has, or a cycle more."""
    num_cycles = (cycle.num_layers - cycle.start) // cycle.length
    each = astuple(_more(shallow, deeper))
    return _Numel(*(here + num_cycles * more for here, more in zip(astuple(shallow), each, strict=True)))


def _cycles_looked_ahead(run: RunSpec, layout: Layout, cycle: _Cycle, shallow: _Numel, deeper: _Numel) -> int:
    """How many cycles before its end a model keeps in forward what backward soon needs; 0: it keeps everything.

    partitioned_param_coordinator.py, ``__params_to_release``: a weight stays if it comes again within so many elements,
    and what is inside of leaf modules is not counted. Between two uses each later cycle is passed once a pass.
    """
    if run.engine != "deepspeed" or run.zero.stage != 3:
        return 0
    limit: int = ds_config(run, layout.world_size)["zero_optimization"]["stage3_max_reuse_distance"]
    passes = 3 if run.activation_checkpointing == "full" else 2
    if _NESTING * passes * _full(cycle, shallow, deeper).total <= limit:
        return 0
    return -(-limit // max(1, passes * _more(shallow, deeper).outside_leaves))


def _cycles_that_hold_ends(run: RunSpec, layout: Layout, shallow: _Numel, deeper: _Numel) -> int:
    """How many cycles a model needs so that the ends of all ranks' partitions lie in cycles, as they do in the full
    one: a rank's share is more than what is trained beside the cycles, and one of them."""
    ranks, each = layout.zero_degree, deeper.trained - shallow.trained
    if run.zero.stage == 3 or ranks == 1 or not each:
        return 0
    beside = shallow.trained - each  # ``shallow`` has one cycle
    return -(-(ranks - 1) * beside // each) + ranks


def _limits(run: RunSpec, layout: Layout, each: _Numel, full: _Numel) -> Iterator[tuple[int, int, int]]:
    """(limit, elements that count towards it in a cycle, in the full model): what DeepSpeed sums up over layers."""
    if run.engine != "deepspeed":
        return
    zero = ds_config(run, layout.world_size)["zero_optimization"]
    yield zero["reduce_bucket_size"], each.trained, full.trained
    if run.zero.stage == 0:
        yield _FALLBACK_BUCKET_NUMEL, each.trained, full.trained
    if run.zero.stage != 3:
        return
    ranks = layout.zero_degree
    yield zero["sub_group_size"], each.trained // ranks, shard(full.trained, ranks)
    yield zero["stage3_model_persistence_threshold"], 0, full.total
    for name in ("stage3_prefetch_bucket_size", "stage3_max_live_parameters"):
        yield zero[name], each.total, full.total
