"""Plan: a closed run, what is predicted of it, and why every better-looking candidate was refused."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vramplan.errors import SpecError
from vramplan.facts.device import Device, Node
from vramplan.memory.ledger import Estimate, PhaseBytes
from vramplan.memory.term import Basis, Category, Place, Term
from vramplan.search.space import Candidate
from vramplan.spec.load import read_yaml_mapping, run_from_mapping
from vramplan.spec.run import RunSpec

PLAN_FORMAT = 1
"""Version of the form of plan.yaml; the file's first key, by which a plan is told from a spec."""
_FORMAT_KEY = "vramplan_plan"


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the arithmetic says of a closed run, on one rank unless said otherwise."""

    step_time_s: float
    """Seconds of one optimizer step, by a roofline with assumed efficiencies: it ranks, it does not promise."""
    tokens_per_s: float
    """Tokens of all ranks together."""
    peak_moment: str
    peak_phase: str
    allocated_peak_bytes: int
    used_peak_bytes: int
    capacity_bytes: int
    host_bytes_per_node: int
    host_capacity_bytes: int | None
    phases: tuple[PhaseBytes, ...]
    terms: tuple[Term, ...]
    """Alive at the peak, then what the driver counts beyond tensors: they add up to ``used_peak_bytes``."""
    host_terms: tuple[Term, ...] = ()

    @classmethod
    def of(cls, run: RunSpec, estimate: Estimate, step_time_s: float) -> Prediction:
        """The prediction that ``estimate`` and the step time make for a closed run."""
        peak = estimate.peak
        return cls(
            step_time_s=step_time_s,
            tokens_per_s=(run.global_batch_size or 0) * run.seq_len / step_time_s,
            peak_moment=peak.name,
            peak_phase=peak.phase.value,
            allocated_peak_bytes=estimate.allocated_peak_bytes,
            used_peak_bytes=estimate.used_peak_bytes,
            capacity_bytes=estimate.capacity_bytes,
            host_bytes_per_node=estimate.host_bytes_per_node,
            host_capacity_bytes=estimate.host_capacity_bytes,
            phases=estimate.phases,
            terms=(*peak.terms, *estimate.overhead),
            host_terms=estimate.host_terms,
        )

    @property
    def training_peak_bytes(self) -> int:
        """The most that tensors take before the export, in bytes, where nothing is resumed."""
        held = (each.peak_bytes for each in self.phases if each.phase not in ("resume", "export"))
        return max(held, default=self.allocated_peak_bytes)


@dataclass(frozen=True, slots=True)
class Refusal:
    """A candidate that looked better than the chosen one (faster, or as fast and simpler), and why it was not taken."""

    candidate: Candidate
    reason: str
    """One clause: the moment and bytes that do not fit, or DeepSpeed's reason."""
    step_time_s: float
    tokens_per_s: float
    """Of all ranks together; step times of different global batches do not compare."""
    used_peak_bytes: int | None = None
    """None where its bytes are not covered."""
    peak_moment: str | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """A run that is ready to be trained; round-trips through plan.yaml."""

    run: RunSpec
    """Closed: nothing that the planner decides is None."""
    node: Node
    prediction: Prediction
    margin_frac: float
    """Share of the capacity that the plan leaves free."""
    refused: Sequence[Refusal] = ()
    """The best-looking first."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Of vramplan and of what is installed to train with, when the plan was made."""

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain values, in the order in which plan.yaml shows them."""
        return {
            _FORMAT_KEY: PLAN_FORMAT,
            "run": self.run.model_dump(mode="json", exclude_none=True),
            "node": _node_to_dict(self.node),
            "prediction": _prediction_to_dict(self.prediction),
            "margin_frac": self.margin_frac,
            "refused": [_drop_none(asdict(refusal)) for refusal in self.refused],
            "versions": dict(self.versions),
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any], source: str = "plan") -> Plan:
        """The plan that ``to_dict`` wrote.

        Raises:
            SpecError: a part is missing or malformed, or the form is of another version.
        """
        if fields.get(_FORMAT_KEY) != PLAN_FORMAT:
            raise SpecError(
                f"{source}: is no plan of this version ({_FORMAT_KEY}: {PLAN_FORMAT}); "
                "make it again with `vramplan plan`"
            )
        try:
            return cls(
                run=run_from_mapping(fields["run"], f"{source}: run"),
                node=_node_from_dict(fields["node"]),
                prediction=_prediction_from_dict(fields["prediction"]),
                margin_frac=fields["margin_frac"],
                refused=tuple(_refusal_from_dict(refusal) for refusal in fields.get("refused", ())),
                versions=dict(fields.get("versions", {})),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise SpecError(f"{source}: is a damaged plan ({error!r}); make it again with `vramplan plan`") from error

    def save(self, path: Path | str) -> None:
        """Writes plan.yaml; one that is there stays whole until this one is (a run is resumed from it)."""
        import yaml

        text = yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True, width=120)
        path = Path(path)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            temporary.write_text(_HEADER + text, encoding="utf-8")
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path | str) -> Plan:
        """Reads plan.yaml; raises SpecError as ``from_dict`` does."""
        return cls.from_dict(read_yaml_mapping(Path(path)), source=str(path))


_SAYS_LENGTH_ONLY = {
    "max_steps",
    "epochs",
    "sample",
    "sample_tokens",
    "log_every",
    "hours_between_failures",
    "lm_eval",
}


def plan_id(run: RunSpec) -> str:
    """A short name of everything that decides the bytes of a closed run: how long it is and what it prints do not."""
    import hashlib

    text = run.model_dump_json(exclude={"training": _SAYS_LENGTH_ONLY, "hardware": True})
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


_HEADER = """\
# A plan by vramplan: `vramplan train` runs it as it stands.
# Bytes are of one rank unless named otherwise; `run` is a complete spec and may be edited and planned again.
"""


def asked_fields(model: Path | str) -> tuple[dict[str, Any], str]:
    """The fields of a spec that a model's name or a YAML file stands for, and the file's name for errors (or "").

    A plan file counts as the spec that it holds, with everything in it decided.

    Raises:
        SpecError: the file cannot be read as YAML.
    """
    path = Path(model).expanduser()
    if path.suffix.lower() not in (".yaml", ".yml"):
        return {"model": str(model)}, ""
    content = read_yaml_mapping(path)
    return (dict(content.get("run", {})) if is_plan(content) else content), str(path)


def is_plan(fields: Mapping[str, Any]) -> bool:
    """Whether a file's mapping is a plan (else it is a spec)."""
    return _FORMAT_KEY in fields


_DEVICE_FIELDS = (
    "name",
    "kind",
    "memory_bytes",
    "usable_bytes",
    "bf16_flops",
    "fp32_flops",
    "memory_bandwidth",
    "link_bandwidth",
    "compute_capability",
)
_NODE_FIELDS = ("gpus_per_node", "num_nodes", "host_memory_bytes", "memory_cap_bytes", "overhead_file")


def _node_to_dict(node: Node) -> dict[str, Any]:
    device = {name: getattr(node.device, name) for name in _DEVICE_FIELDS}
    if node.device.compute_capability is not None:
        device["compute_capability"] = list(node.device.compute_capability)  # YAML has no tuples
    return _drop_none({"device": _drop_none(device)} | {name: getattr(node, name) for name in _NODE_FIELDS})


def _node_from_dict(fields: Mapping[str, Any]) -> Node:
    device = dict(fields["device"])
    capability = device.pop("compute_capability", None)
    device["compute_capability"] = None if capability is None else tuple(capability)
    return Node(**{**fields, "device": Device(**device)})


def _prediction_to_dict(prediction: Prediction) -> dict[str, Any]:
    plain = {name: getattr(prediction, name) for name in Prediction.__dataclass_fields__}
    plain["phases"] = [asdict(phase) for phase in prediction.phases]
    for name in ("terms", "host_terms"):
        plain[name] = [term_to_dict(term) for term in getattr(prediction, name)]
    return _drop_none(plain)


def _prediction_from_dict(fields: Mapping[str, Any]) -> Prediction:
    plain = dict(fields)
    plain["phases"] = tuple(PhaseBytes(**phase) for phase in fields["phases"])
    for name in ("terms", "host_terms"):
        plain[name] = tuple(_term_from_dict(term) for term in fields.get(name, ()))
    plain.setdefault("host_capacity_bytes", None)
    return Prediction(**plain)


def term_to_dict(term: Term) -> dict[str, Any]:
    """A term as plain values."""
    return {
        "name": term.name,
        "bytes": term.num_bytes,
        "category": term.category.value,
        "basis": term.basis.value,
        "place": term.place.value,
        "note": term.note,
    }


def _term_from_dict(fields: Mapping[str, Any]) -> Term:
    return Term(
        name=fields["name"],
        num_bytes=fields["bytes"],
        category=Category(fields["category"]),
        basis=Basis(fields["basis"]),
        note=fields["note"],
        place=Place(fields["place"]),
    )


def _refusal_from_dict(fields: Mapping[str, Any]) -> Refusal:
    return Refusal(**{**fields, "candidate": Candidate(**fields["candidate"])})


def _drop_none(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}
