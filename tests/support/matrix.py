"""Estimator against simulator: the runs of a matrix over everything that decides bytes, and how far the two differ."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vramplan.errors import SpecError
from vramplan.facts.device import Node
from vramplan.facts.devices import resolve_node
from vramplan.facts.resolve import resolve_architecture
from vramplan.memory.estimate import COVERED_FAMILIES, UncoveredError, check_covered, estimate
from vramplan.memory.from_run import job_from_run
from vramplan.memory.ledger import Estimate, PhaseBytes
from vramplan.search.legality import illegality
from vramplan.simulate.asked import request_on
from vramplan.simulate.request import Conditions, SimulationRequest
from vramplan.spec.run import RunSpec

from support.small_configs import SMALL

PEAK_FRAC, PHASE_FRAC = 0.01, 0.02
"""How far the estimate may be from the simulation: at the steps' highest peak, and at every phase's peak and end."""
WIDENED = {
    "hidden_size": 16,
    "n_embd": 16,
    "intermediate_size": 16,
    "intermediate_size_mlp": 16,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "n_inner": 16,
    "ffn_dim": 16,
    "word_embed_proj_dim": 16,
    "vocab_size": 16,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "sliding_window": 16,
    "head_dim": 4,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "v_head_dim": 4,
    "num_attention_heads": 4,
    "n_head": 4,
    "num_key_value_heads": 4,
    "num_kv_heads": 4,
}
"""What makes the small configs of the tests as wide as real ones: 1,024 wide, 16 heads, few layers."""
METHODS: dict[str, dict[str, Any]] = {
    "full": {"kind": "full"},
    "frozen": {"kind": "full", "train_last_blocks": 1},
    "expanded": {"kind": "full", "new_blocks": 1},
    "lora": {"kind": "lora", "r": 8},
    "dropout": {"kind": "lora", "r": 8, "dropout": 0.05},
    "dora": {"kind": "lora", "r": 8, "use_dora": True},
    "qlora": {"kind": "qlora", "r": 8},
}
OFFLOAD = {"none": ("none", "none"), "optimizer": ("cpu", "none"), "both": ("cpu", "cpu")}
BUCKETS = {"default": {}, "small": {"reduce_bucket_size": 1_000_000, "stage3_prefetch_bucket_size": 1_000_000}}
FACTORS: dict[str, Sequence[Any]] = {
    "model": [f"{family}.{number}" for number, (family, _) in enumerate(SMALL)],
    "method": list(METHODS),
    "stage": [0, 1, 2, 3],
    "checkpointing": ["none", "full"],
    "attention": ["sdpa", "eager", "flash_attention_2"],
    "precision": ["bf16", "fp32", "bf16-autocast", "fp16"],
    "mask": ["none", "packed", "padded"],
    "device": ["cuda", "cpu"],
    "ranks": [4, 1],
    "micro_batch": [2, 1],
    "accum": [1, 2],
    "optimizer": ["adamw", "adamw_torch", "sgd"],
    "offload": list(OFFLOAD),
    "buckets": list(BUCKETS),
    "outputs": ["let go", "kept"],
}
SEQ_LEN = 512
SHALLOW = "x2"
"""After a model's name: the same, two layers deep."""


@dataclass(frozen=True, slots=True)
class Case:
    """One run: a value of every factor."""

    values: tuple[tuple[str, Any], ...]

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Case:
        return cls(tuple((name, values[name]) for name in FACTORS))

    def __getitem__(self, name: str) -> Any:
        return dict(self.values)[name]

    @property
    def key(self) -> str:
        """The values in the order of ``FACTORS``; ``parse`` reads it."""
        return "/".join(str(value) for _, value in self.values)

    @classmethod
    def parse(cls, key: str) -> Case:
        words = key.split("/")
        named = {name: {str(value): value for value in values} for name, values in FACTORS.items()}
        named["model"] |= {f"{model}{SHALLOW}": f"{model}{SHALLOW}" for model in FACTORS["model"]}
        return cls(tuple((name, named[name][word]) for name, word in zip(FACTORS, words, strict=True)))

    @property
    def family(self) -> str:
        return str(self["model"]).partition(".")[0]

    @property
    def halved(self) -> bool:
        """Whether fp32 weights are halved as they are split, as in records of the CPU (``weights_were_halved``); those
        of four bits are not, which the engine splits (``build_model``)."""
        if self["method"] == "qlora":
            return False
        return self["device"] == "cpu" and self["stage"] == 3 and self["precision"] in ("fp32", "bf16-autocast")

    def run(self) -> RunSpec:
        """The closed run."""
        value = dict(self.values)
        offload_optimizer, offload_param = OFFLOAD[value["offload"]]
        return RunSpec.model_validate(
            {
                "model": value["model"],
                "model_config_fields": config_of(value["model"]),
                "method": METHODS[value["method"]],
                "precision": value["precision"],
                "seq_len": SEQ_LEN,
                "micro_batch_size": value["micro_batch"],
                "grad_accum_steps": value["accum"],
                "attention": value["attention"],
                "attention_mask": value["mask"] == "padded",
                "data": {"packing": "best_fit" if value["mask"] == "packed" else "none"},
                "activation_checkpointing": value["checkpointing"],
                "keep_outputs": value["outputs"] == "kept",
                "optimizer": {"kind": value["optimizer"]},
                "zero": {
                    "stage": value["stage"],
                    "offload_optimizer": offload_optimizer,
                    "offload_param": offload_param,
                    **BUCKETS[value["buckets"]],
                },
                "layout": {"dp": value["ranks"]},
                "hardware": {
                    "gpu": "h100-80gb" if value["device"] == "cuda" else "cpu",
                    "gpus_per_node": value["ranks"],
                    "memory_cap": None if value["device"] == "cuda" else "1TiB",
                    "host_memory": "1TiB",
                },
            }
        )


@dataclass(frozen=True, slots=True)
class Prepared:
    """A case that the estimator covers."""

    case: Case
    run: RunSpec
    node: Node
    estimate: Estimate

    def request(self) -> SimulationRequest:
        return request_on(self.run, self.node, Conditions(halved_weights=self.case.halved), key=self.case.key)


def config_of(model: str) -> dict[str, Any]:
    """The fields of a widened small config by its name in ``FACTORS``."""
    family, _, number = model.removesuffix(SHALLOW).partition(".")
    fields = SMALL[int(number)][1]
    if model.endswith(SHALLOW):
        fields = {**fields, **{name: 2 for name in ("num_hidden_layers", "n_layer") if name in fields}}
    return {"model_type": family, "pad_token_id": 0, **{name: _widened(name, value) for name, value in fields.items()}}


def _widened(name: str, value: Any) -> Any:
    return value * WIDENED[name] if name in WIDENED and isinstance(value, int) else value


def prepare(case: Case) -> Prepared | str:
    """The case with its estimate, or why there is none: DeepSpeed refuses it, or the arithmetic does not cover it."""
    refused = why_not(case)
    if refused:
        return refused
    run = case.run()
    node = resolve_node(run.hardware)
    found = estimate(run, node, resolve_architecture(run), rank=0, weights_halved=case.halved)
    return Prepared(case, run, node, found)


def why_not(case: Case) -> str:
    """Why a case has no estimate; empty where it has one."""
    run = case.run()
    node, architecture = resolve_node(run.hardware), resolve_architecture(run)
    refused = illegality(run, node, architecture)
    if refused is not None:
        return refused.reason
    try:
        check_covered(job_from_run(run, node, architecture))
    except (UncoveredError, SpecError) as error:
        return str(error)
    return ""


def covered_models() -> list[str]:
    """Those of families that the estimator covers."""
    return [name for name in FACTORS["model"] if _architecture_family(name) in COVERED_FAMILIES]


def _architecture_family(model: str) -> str:
    family = model.partition(".")[0]
    return {"gemma3_text": "gemma3", "llama4_text": "llama4"}.get(family, family)


@dataclass(frozen=True, slots=True)
class Difference:
    """Where an estimate leaves the bar."""

    what: str
    """``peak``, or a phase and ``peak`` or ``end``."""
    estimated_bytes: int
    simulated_bytes: int

    @property
    def error_frac(self) -> float:
        if self.estimated_bytes == self.simulated_bytes:
            return 0.0
        return self.estimated_bytes / max(self.simulated_bytes, 1) - 1

    def __str__(self) -> str:
        return f"{self.what}: {self.estimated_bytes:,} against {self.simulated_bytes:,} ({self.error_frac:+.2%})"


def differences(found: Estimate, simulated: Sequence[PhaseBytes]) -> Iterator[Difference]:
    """Every figure of both, the steps' highest peak first.

    Not of loading: the estimate is of a checkpoint being read, the simulation builds from the config alone.
    """
    by_name = {phase.phase: phase for phase in simulated}
    highest = max(phase.peak_bytes for phase in simulated if phase.phase.startswith("step"))
    yield Difference("peak", found.train_allocated_peak_bytes, highest)
    for phase in found.phases[1:]:
        other = by_name[phase.phase]
        yield Difference(f"{phase.phase} peak", phase.peak_bytes, other.peak_bytes)
        yield Difference(f"{phase.phase} end", phase.end_bytes, other.end_bytes)


def beyond_the_bar(found: Estimate, simulated: Sequence[PhaseBytes]) -> list[Difference]:
    """The figures that differ by more than they may."""
    return [
        each
        for each in differences(found, simulated)
        if abs(each.error_frac) > (PEAK_FRAC if each.what == "peak" else PHASE_FRAC)
    ]


def pairwise(
    factors: Mapping[str, Sequence[Any]],
    turns: tuple[str, Sequence[Any]] | None = None,
    seed: int = 0,
    tries: int = 40,
    taken: Iterable[Case] = (),
) -> list[Case]:
    """Cases that the estimator covers in which any two values of different factors meet, if some covered case has both.

    ``turns``: a further factor and its values, which are taken in turn where a case allows it. ``taken``: cases whose
    pairs need no other.
    Greedy: of ``tries`` random cases around a pair that is still missing, the one with most missing pairs is taken.
    """
    draw = random.Random(seed)
    missing = {
        frozenset([(one, a), (other, b)])
        for one, other in itertools.combinations(factors, 2)
        for a in factors[one]
        for b in factors[other]
    }
    for case in taken:
        missing -= _pairs(case, factors)
    cases: list[Case] = []
    prepared: dict[Case, bool] = {}
    name, waiting = turns if turns is not None else ("", ())
    queue = list(waiting)
    while missing or queue:
        wanted = min(missing, key=_order) if missing else frozenset()
        choices = {**factors, **({name: queue[:1] or list(waiting)} if name else {})}
        around = [case for case in _around(wanted, choices, draw, tries) if _is_covered(case, prepared)]
        if not around and queue:  # not this one with that pair
            around = [
                case
                for case in _around(wanted, {**factors, name: list(waiting)}, draw, tries)
                if _is_covered(case, prepared)
            ]
        best = max(
            around,
            key=lambda case: len(_pairs(case, factors) & missing),
            default=None,
        )
        if best is None:
            missing.discard(wanted)
            continue
        cases.append(best)
        if queue and best[name] == queue[0]:
            del queue[0]
        missing -= _pairs(best, factors)
    return cases


def cover_in_turns() -> list[Case]:
    """A pairwise cover of all factors but the models, which take turns: about 50 cases."""
    others = {name: values for name, values in FACTORS.items() if name != "model"}
    return pairwise(others, turns=("model", covered_models()))


def _order(pair: frozenset[tuple[str, Any]]) -> list[str]:
    return sorted(f"{name}={value}" for name, value in pair)


def _around(
    pair: Iterable[tuple[str, Any]], factors: Mapping[str, Sequence[Any]], draw: random.Random, tries: int
) -> list[Case]:
    return [
        Case.of({**{name: draw.choice(values) for name, values in factors.items()}, **dict(pair)}) for _ in range(tries)
    ]


def _is_covered(case: Case, known: dict[Case, bool]) -> bool:
    if case not in known:
        known[case] = not why_not(case)
    return known[case]


def _pairs(case: Case, factors: Mapping[str, Sequence[Any]]) -> set[frozenset[tuple[str, Any]]]:
    values = [(name, case[name]) for name in factors]
    return {frozenset(pair) for pair in itertools.combinations(values, 2)}


@dataclass(frozen=True, slots=True)
class Known:
    """A difference with a known reason."""

    reason: str
    applies: Callable[[Case], bool]


KNOWN: tuple[Known, ...] = ()


def known_reason(case: Case) -> str:
    """Why an estimate of the case may leave the bar; empty where it may not."""
    return next((known.reason for known in KNOWN if known.applies(case)), "")
