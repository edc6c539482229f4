"""The estimate as corrected by what was seen: by a run that met its wall, or by a probe that did not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from vramplan.memory.ledger import Estimate
from vramplan.spec.run import RunSpec

_IN_STEPS = ("forward", "backward", "optimizer_step")


def kind_of(phase: str) -> str:
    """``backward`` of ``step2.micro1.backward``."""
    return phase.rpartition(".")[2]


def predicted_bytes(known: Estimate, phase: str, step: int) -> int:
    """What the estimate says of a phase, by whatever step and micro-batch of that kind holds most; of one that it does
    not know, what the run holds between steps."""
    kind = kind_of(phase)
    if kind in _IN_STEPS:
        which = "step1." if step <= 1 else "step2."
        return max(
            each.peak_bytes for each in known.phases if each.phase.startswith(which) and each.phase.endswith(kind)
        )
    for each in known.phases:
        if each.phase == kind:
            return each.peak_bytes
    return known.between_steps_bytes


def eval_batch(run: RunSpec) -> int:
    """Sequences of one rank's forward in an evaluation."""
    return run.training.eval_micro_batch_size or run.micro_batch_size or 1


@dataclass(frozen=True, slots=True)
class Seen:
    """What a phase needed, beside what the estimate had said of it."""

    phase: str
    needed_bytes: int
    predicted_bytes: int


@dataclass(frozen=True, slots=True)
class Correction:
    """What is added to predictions."""

    beyond: Mapping[str, int] = field(default_factory=dict)
    """By kind of phase, the most that was needed beyond what was predicted of one of its kind."""

    @classmethod
    def of(cls, seen: Iterable[Seen]) -> Correction:
        """What ``seen`` teaches; predictions are never lowered."""
        beyond: dict[str, int] = {}
        for each in seen:
            kind = kind_of(each.phase)
            beyond[kind] = max(beyond.get(kind, 0), each.needed_bytes - each.predicted_bytes)
        return cls({kind: num_bytes for kind, num_bytes in beyond.items() if num_bytes > 0})

    def bytes_of(self, known: Estimate, phase: str, step: int) -> int:
        """The estimate of a phase with what was seen beyond it in phases of its kind."""
        return predicted_bytes(known, phase, step) + self.beyond.get(kind_of(phase), 0)

    @property
    def most(self) -> int:
        """The most that anything was seen to need beyond its prediction."""
        return max(self.beyond.values(), default=0)

    def fits(self, known: Estimate) -> bool:
        """Whether every phase stays within what the device and its host offer."""
        phases = [(each.phase, 1 if each.phase.startswith("step1.") else 2) for each in known.phases]
        most = max(self.bytes_of(known, phase, step) for phase, step in phases)
        beyond_tensors = known.used_peak_bytes - known.allocated_peak_bytes
        return known.host_fits and most + beyond_tensors <= known.capacity_bytes
