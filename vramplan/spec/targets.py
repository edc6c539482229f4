"""What PEFT makes of an adapter's targets on models whose experts transformers 5 fused into one parameter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

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
    """Names of parameters that are adapted as they are: ``gate_up_proj`` and ``down_proj`` of the experts, ``router``;
    ``gate_up_proj:2`` with twice the rank, for gate and up that were targets of their own."""


@lru_cache(maxsize=64)
def resolve_targets(method: LoraMethod, architecture: Architecture) -> Targets:
    """The targets as PEFT converts them (``_convert_peft_config_moe``).

    In families with experts it takes ``gate_proj``, ``up_proj``, ``down_proj`` and ``gate`` for the routed experts and
    their router whichever layers they are in: dense layers and shared experts get no adapters on linears of those
    names. A pattern stands for the last names of what it matches.

    Raises:
        SpecError: of what is fused in one parameter only a part is named; ``target_parameters`` name something else
            than experts and routers.
    """
    mapping = _MAPPINGS.get(architecture.family)
    if mapping is None:
        return Targets(method, frozenset(_named_parameter(name, architecture) for name in method.target_parameters))
    if method.target_parameters:
        raise SpecError(
            f"method.target_parameters: PEFT has other names for the experts of {architecture.family}; name "
            f"{', '.join(mapping)} in target_modules instead"
        )
    names = _names(method, architecture, mapping)
    converted = {name: name.rpartition(".")[2] for name in names if name.rpartition(".")[2] in mapping}
    fused = {old for old, new in mapping.items() if new == "gate_up_proj"}
    if 0 < len(fused.intersection(converted.values())) < len(fused):
        raise SpecError(
            f"method.target_modules: {' and '.join(sorted(fused))} are one parameter of the experts in "
            f"{architecture.family}; name both or neither"
        )
    left = method.model_copy(update={"target_modules": tuple(sorted(names - set(converted)))})
    return Targets(left, frozenset(_SHORT[mapping[old]] for old in converted.values()))


_SHORT = {"gate_up_proj": "gate_up_proj:2", "down_proj": "down_proj", "gate.weight": "router"}


def _named_parameter(target: str, architecture: Architecture) -> str:
    """The parameter of every block with experts that a target is the ending of (``_inject_parameters``)."""
    for block in architecture.mixtures:
        names = {f"{block.experts.name}.{suffix}": suffix for suffix in ("gate_up_proj", "down_proj")}
        if not block.router.is_linear:
            names[f"{block.router.name}.weight"] = "router"
        for name, short in names.items():
            if name == target or name.endswith(f".{target}"):
                return short
    if not architecture.mixtures:
        raise SpecError(
            f"method.target_parameters: {architecture.family} has no routed experts, whose weights these would be; "
            "name projections in method.target_modules instead"
        )
    raise SpecError(
        f"method.target_parameters: {target!r} is the ending of no router's or routed experts' weight in every layer "
        f"of {architecture.family}; name some of experts.gate_up_proj, experts.down_proj"
    )


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


@lru_cache(maxsize=64)
def saved_modules(method: LoraMethod, architecture: Architecture) -> dict[str, bool]:
    """The modules of which a copy is trained whole, by name, and whether it is an ``nn.Linear``'s: a head that shares
    the token table's matrix shares the copy, whichever of them is named (``ensure_weight_tying``).

    Raises:
        SpecError: something else than the token table and the head is named, both an adapter and a copy are asked for,
            or PEFT would not tie the copies.
    """
    if not method.modules_to_save:
        return {}
    head, table = architecture.head, architecture.embeddings[0]
    known = {table.name: False, head.name: head.is_nn_linear}
    asked = {name: is_linear for name, is_linear in known.items() if method.saves(name)}
    for each in method.modules_to_save:
        if not any(name == each or name.endswith(f".{each}") for name in known):
            raise SpecError(
                f"method.modules_to_save: {each!r} is neither the token table ({table.name}) nor the head ({head.name})"
            )
    for name in asked:
        if method.adapts_table(name):
            raise SpecError(f"method.modules_to_save: {name} is in method.target_modules too; name it in one of them")
    if not architecture.tied_embeddings:
        return asked
    if not {name.rpartition(".")[2] for name in known} <= _PEFT_TIES:
        raise SpecError(
            f"method.modules_to_save: PEFT would part {table.name} from {head.name}, which are one matrix in "
            f"{architecture.family}; adapt it instead (method.target_modules), or leave it out"
        )
    return {table.name: head.is_nn_linear}


_PEFT_TIES = frozenset(["embed_tokens", "lm_head"])
"""Modules whose copies PEFT keeps one matrix (peft 0.21, utils/other.py, ``EMBEDDING_LAYER_NAMES``)."""


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

    Each expert has factors of its own; gate and up that were targets of their own have twice the rank together
    (``rank_pattern``). Wrappers of two parameters of one module lie in each other.
    """
    router, experts = block.router, block.experts
    hidden, inner, count = experts.hidden_size, experts.intermediate, experts.num_experts
    ranks = {name.partition(":")[0]: r * int(name.partition(":")[2] or 1) for name in adapted}
    wrapped = [name for name in ("gate_up_proj", "down_proj") if name in ranks]
    features = {"gate_up_proj": (hidden, 2 * inner), "down_proj": (inner, hidden)}
    made = []
    for part in block.parts:
        if part is router and "router" in ranks:
            name = router.name
            made.append(_fused(f"{name}.weight", name, r * router.in_features, r * router.num_experts))
        if part is experts:
            for position, suffix in enumerate(wrapped):
                rank, (fan_in, fan_out) = ranks[suffix], features[suffix]
                if experts.seen_as_untransposed:
                    fan_in, fan_out = fan_out, fan_in
                owner = experts.name + ".base_layer" * (len(wrapped) - 1 - position)
                made.append(_fused(f"{experts.name}.{suffix}", owner, count * rank * fan_in, count * rank * fan_out))
    return tuple(made)


def _fused(parameter: str, owner: str, down_numel: int, up_numel: int) -> FusedAdapter:
    return FusedAdapter(parameter, f"{owner}.lora_A.weight", down_numel, f"{owner}.lora_B.weight", up_numel)
