"""What PEFT makes of an adapter's targets on models whose experts transformers 5 fused into one parameter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from vramplan.errors import SpecError
from vramplan.facts.architecture import Architecture, MixtureOfExperts
from vramplan.spec.trainable import LoraMethod

_FUSED = {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj", "down_proj": "down_proj", "gate": "gate.weight"}
_MIXTRAL = {"w1": "gate_up_proj", "w3": "gate_up_proj", "w2": "down_proj", "gate": "gate.weight"}
_MAPPINGS = {"deepseek_v2": _FUSED, "deepseek_v3": _FUSED, "mixtral": _MIXTRAL, "qwen3_moe": _FUSED}
"""Names of linears that were, and of the parameters that stand in their place, in the families whose targets are
converted; Qwen2-MoE is not one (peft 0.21, utils/transformers_weight_conversion.py)."""


@dataclass(frozen=True, slots=True)
class Targets:
    """What gets an adapter."""

    method: LoraMethod
    """The method with the targets that are left for linears."""
    parameters: frozenset[str] = frozenset()
    """Names of parameters that are adapted as they are: the experts' and the router's."""


def resolve_targets(method: LoraMethod, architecture: Architecture) -> Targets:
    """The targets as PEFT converts them (``_convert_peft_config_moe``).

    In families with experts it takes ``gate_proj``, ``up_proj``, ``down_proj`` and ``gate`` for the routed experts and
    their router whichever layers they are in: dense layers and shared experts get no adapters on linears of those
    names. A pattern stands for the last names of what it matches.

    Raises:
        SpecError: of what is fused in one parameter only a part is named.
    """
    mapping = _MAPPINGS.get(architecture.family)
    if mapping is None:
        return Targets(method)
    names = _names(method, architecture, mapping)
    converted = {name: name.rpartition(".")[2] for name in names if name.rpartition(".")[2] in mapping}
    fused = {old for old, new in mapping.items() if new == "gate_up_proj"}
    if 0 < len(fused.intersection(converted.values())) < len(fused):
        raise SpecError(
            f"method.target_modules: {' and '.join(sorted(fused))} are one parameter of the experts in "
            f"{architecture.family}; name both or neither"
        )
    left = method.model_copy(update={"target_modules": tuple(sorted(names - set(converted)))})
    return Targets(left, frozenset(mapping[old] for old in converted.values()))


def _names(method: LoraMethod, architecture: Architecture, mapping: dict[str, str]) -> set[str]:
    targets = method.target_modules
    if not isinstance(targets, str):
        return set(targets)
    linears = {name for name, _ in architecture.named_linears()}
    if targets == "all-linear":
        return {name.rpartition(".")[2] for name in linears} | set(mapping)
    known = linears | {architecture.head.name} | set(_fused_names(architecture, mapping))
    return {name.rpartition(".")[2] for name in known if method.adapts(name)}


def _fused_names(architecture: Architecture, mapping: dict[str, str]) -> Iterator[str]:
    """The names that experts and routers had as linears."""
    for index, layer in enumerate(architecture.layers):
        block, prefix = layer.feed_forward, f"{architecture.layer_prefix}.{index}"
        if isinstance(block, MixtureOfExperts):
            yield f"{prefix}.{block.router.name}"
            yield from (f"{prefix}.{block.experts.name}.{old}" for old in mapping if old != "gate")


@dataclass(frozen=True, slots=True)
class FusedAdapter:
    """An adapter on a parameter as it is (peft 0.21, tuners/lora/layer.py, ``ParamWrapper``): names within the layer
    and elements."""

    parameter: str
    down: str
    down_numel: int
    up: str
    up_numel: int


def fused_adapters(block: MixtureOfExperts, adapted: frozenset[str], r: int) -> tuple[FusedAdapter, ...]:
    """The adapters on a block's router and experts, in registration order.

    Each expert has factors of its own; gate and up together have twice the rank (``rank_pattern``). Wrappers of two
    parameters of one module lie in each other.
    """
    router, experts = block.router, block.experts
    hidden, inner, count = experts.hidden_size, experts.intermediate, experts.num_experts
    wrapped = [name for name in ("gate_up_proj", "down_proj") if name in adapted]
    shapes = {"gate_up_proj": (2 * r, hidden, 2 * inner), "down_proj": (r, inner, hidden)}
    made = []
    for part in block.parts:
        if part is router and "gate.weight" in adapted:
            name = router.name
            made.append(_fused(f"{name}.weight", name, r * router.in_features, r * router.num_experts))
        if part is experts:
            for position, suffix in enumerate(wrapped):
                rank, fan_in, fan_out = shapes[suffix]
                owner = experts.name + ".base_layer" * (len(wrapped) - 1 - position)
                made.append(_fused(f"{experts.name}.{suffix}", owner, count * rank * fan_in, count * rank * fan_out))
    return tuple(made)


def _fused(parameter: str, owner: str, down_numel: int, up_numel: int) -> FusedAdapter:
    return FusedAdapter(parameter, f"{owner}.lora_A.weight", down_numel, f"{owner}.lora_B.weight", up_numel)
