"""compare_records: the estimate laid beside the measurement, record by record and phase by phase."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vramplan.errors import VramplanError
from vramplan.facts.device import Device, Node
from vramplan.facts.devices import find_device
from vramplan.facts.resolve import resolve_architecture
from vramplan.measure.record import (
    ForwardShape,
    Measured,
    PassedMoments,
    Record,
    UnreadRecord,
    read_records_leniently,
    steps_were_skipped,
    weights_were_halved,
)
from vramplan.measure.record_spec import run_from_record_spec
from vramplan.memory.estimate import estimate
from vramplan.memory.ledger import Estimate
from vramplan.memory.passes import STEPS_ONLY, Batch, Passes
from vramplan.units import TIB


@dataclass(frozen=True, slots=True)
class PhaseComparison:
    """One phase of one record: its peak, and what is left allocated at its end."""

    phase: str
    predicted_bytes: int
    measured_bytes: int
    predicted_end_bytes: int
    measured_end_bytes: int

    @property
    def error_frac(self) -> float:
        """predicted / measured - 1 of the peak."""
        return _error_frac(self.predicted_bytes, self.measured_bytes)


@dataclass(frozen=True, slots=True)
class RecordComparison:
    """One record: the highest allocated bytes of its step phases, predicted and measured."""

    id: str
    label: str
    """The model and what of it was trained."""
    predicted_bytes: int | None
    """None where the estimator does not cover the record."""
    measured_bytes: int | None
    """None where the record's run gave no figure (it ran out of memory, or died)."""
    reason: str = ""
    """Why there is no error to state."""
    phases: tuple[PhaseComparison, ...] = ()
    simulated_bytes: int | None = None
    """The same figure by simulation; None where none was asked for or it did not reach its end."""
    simulated_reason: str = ""
    """Why there is no simulated figure where one was asked for."""

    @property
    def covered(self) -> bool:
        """Whether both figures are there."""
        return self.predicted_bytes is not None and self.measured_bytes is not None

    @property
    def error_frac(self) -> float | None:
        """predicted / measured - 1: above zero is too many bytes, below is too few."""
        if self.predicted_bytes is None or self.measured_bytes is None:
            return None
        return _error_frac(self.predicted_bytes, self.measured_bytes)

    @property
    def simulated_error_frac(self) -> float | None:
        """simulated / measured - 1."""
        if self.simulated_bytes is None or self.measured_bytes is None:
            return None
        return _error_frac(self.simulated_bytes, self.measured_bytes)


@dataclass(frozen=True, slots=True)
class Summary:
    """Errors of all covered records; None where none is covered."""

    num_records: int
    num_covered: int
    median_abs_error_frac: float | None
    p95_abs_error_frac: float | None
    worst_under_frac: float | None
    """The lowest signed error, 0 where no prediction is below its measurement."""
    worst_over_frac: float | None
    """The highest signed error, 0 where no prediction is above its measurement."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """The answer of ``vramplan compare``."""

    records: tuple[RecordComparison, ...]
    show_phases: bool = False
    """Whether reports list every phase."""
    with_simulation: bool = False
    """Whether the records were simulated too."""

    @property
    def summary(self) -> Summary:
        return summarize([each.error_frac for each in self.records if each.error_frac is not None], len(self.records))

    @property
    def simulated_summary(self) -> Summary:
        """Errors of the simulation against the measurement."""
        errors = [each.simulated_error_frac for each in self.records if each.simulated_error_frac is not None]
        return summarize(errors, len(self.records))

    @property
    def phase_summaries(self) -> dict[str, Summary]:
        """Errors by kind of phase, steps and micro-batches taken together: ``forward``, ``backward``, ..."""
        errors: dict[str, list[float]] = {}
        for record in self.records:
            for phase in record.phases:
                errors.setdefault(phase.phase.rsplit(".", 1)[-1], []).append(phase.error_frac)
        return {name: summarize(found, len(found)) for name, found in errors.items()}


def compare_file(path: Path | str, *, show_phases: bool = False) -> Comparison:
    """Every record of a JSONL file against its estimate.

    Raises:
        SpecError: the file cannot be read or a line is not JSON. A record whose spec is not understood, or that the
            estimator does not cover, is answered with the reason.
    """
    return Comparison(tuple(compare_record(each) for each in read_records_leniently(path)), show_phases)


def compare_record(record: Record | UnreadRecord) -> RecordComparison:
    """One record against the estimate of its spec."""
    measured = measured_peak(record.measured)
    if isinstance(record, UnreadRecord):
        return RecordComparison(record.id, "", None, measured, record.reason)
    label = f"{record.spec.model.name} {record.spec.method.kind}"
    try:
        found = estimate_record(record)
    except VramplanError as error:
        return RecordComparison(record.id, label, None, measured, str(error))
    passed = found.through_steps(_steps_of(record))
    predicted = max(phase.peak_bytes for phase in passed if phase.phase.startswith("step"))
    if measured is None:
        reason = f"nothing measured: the run ended as {record.measured.outcome}"
        return RecordComparison(record.id, label, predicted, None, reason)
    return RecordComparison(record.id, label, predicted, measured, phases=_phases(found, record.measured))


def _steps_of(record: Record) -> int:
    """Optimizer steps that were measured: a run that came to its end has a phase of each."""
    phases = [phase.phase for phase in record.measured.phases if phase.is_step]
    if record.measured.outcome != "ok" or not phases:
        return record.spec.steps
    return 1 if all(name.startswith("step1.") for name in phases) else 2


def estimate_record(record: Record) -> Estimate:
    """The estimate of a record's spec on the device that it was measured on.

    Raises:
        VramplanError: the estimator does not cover it; the text says why.
    """
    run, layout = run_from_record_spec(record.spec)
    device = _device_of(record)
    node = Node(device, gpus_per_node=layout.world_size, memory_cap_bytes=record.spec.cap_bytes)
    # a mask that is all ones is dropped by transformers (masking_utils.py, _ignore_causal_mask_sdpa)
    return estimate(
        run.model_copy(update={"attention_mask": record.spec.attention_mask and record.spec.masked}),
        node,
        resolve_architecture(run),
        rank=0 if record.env.get("backend") == "fake" else None,  # a fake group runs rank 0 alone
        steps_skipped=steps_were_skipped(record),
        weights_halved=weights_were_halved(record),
        managed=record.env.get("backend") == "fake",
        passes=_passes_of(record.spec.passes),
    )


def _passes_of(measured: PassedMoments | None) -> Passes:
    """Only what was measured, with the forwards that came."""
    if measured is None:
        return STEPS_ONLY
    return Passes(
        _batch(measured.evaluation),
        _batch(measured.pinned),
        resumes=measured.resumed,
        exports=measured.exported,
        saves_after_evaluation=measured.saved_after_evaluation,
    )


def _batch(shape: ForwardShape | None) -> Batch | None:
    return None if shape is None else Batch(shape.size, shape.length)


def measured_peak(measured: Measured) -> int | None:
    """The figure to predict: the highest allocated bytes of the step phases."""
    if measured.train_allocated_peak_bytes is not None:
        return measured.train_allocated_peak_bytes
    return max((phase.allocated_peak_bytes for phase in measured.phases if phase.is_step), default=None)


def summarize(errors: Sequence[float], num_records: int) -> Summary:
    """Order statistics of signed errors."""
    if not errors:
        return Summary(num_records, 0, None, None, None, None)
    absolute = sorted(abs(error) for error in errors)
    return Summary(
        num_records=num_records,
        num_covered=len(errors),
        median_abs_error_frac=quantile(absolute, 0.5),
        p95_abs_error_frac=quantile(absolute, 0.95),
        worst_under_frac=min(0.0, *errors),
        worst_over_frac=max(0.0, *errors),
    )


def quantile(rising: Sequence[float], frac: float) -> float:
    """The ``frac`` quantile of sorted values, between neighbours in proportion (numpy's ``linear``)."""
    position = frac * (len(rising) - 1)
    below = int(position)
    above = min(below + 1, len(rising) - 1)
    return rising[below] + (position - below) * (rising[above] - rising[below])


def _phases(found: Estimate, measured: Measured) -> tuple[PhaseComparison, ...]:
    """Phases that both know, in the record's order."""
    predicted = {phase.phase: phase for phase in found.phases}
    return tuple(
        PhaseComparison(
            phase.phase,
            predicted[phase.phase].peak_bytes,
            phase.allocated_peak_bytes,
            predicted[phase.phase].end_bytes,
            phase.allocated_end_bytes,
        )
        for phase in measured.phases
        if phase.phase in predicted
    )


def _device_of(record: Record) -> Device:
    """The device in the record's ``env``; one that is not in the catalogue has room for everything."""
    kind = str(record.env.get("device_type", "cpu"))
    name = record.env.get("device_name") or record.env.get("gpu")
    if kind != "cpu" and isinstance(name, str):
        try:
            return find_device(name)
        except VramplanError:
            return Device(name, "cuda", TIB, TIB, note="not in the catalogue")
    return Device("CPU", "cpu", TIB, TIB) if kind == "cpu" else Device("GPU", "cuda", TIB, TIB)


def _error_frac(predicted: int, measured: int) -> float:
    return predicted / measured - 1 if measured else 0.0


def comparisons_of(records: Iterable[Record]) -> Comparison:
    """Records that are already in memory against their estimates."""
    return Comparison(tuple(compare_record(record) for record in records))
