"""The record form: what was run (a job's spec), where (``env``) and what was measured, one JSON object a line.

A *jobs* file holds specs alone (bare, or under ``spec``); a *records* file holds specs with what was measured.
Importing this module imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from vramplan.errors import SpecError
from vramplan.measure.zero_keys import renamed
from vramplan.spec.base import UserModel
from vramplan.spec.layout import Layout, shard
from vramplan.spec.retain import RetainSpec
from vramplan.spec.run import (
    Attention,
    Checkpointing,
    Engine,
    HardwareSpec,
    Loss,
    Optimizer,
    Precision,
    ZeroSpec,
)
from vramplan.spec.trainable import FullMethod, Method

Outcome = Literal["ok", "oom", "error", "died"]


class JobModel(UserModel):
    """The model of a job: a label, and the fields of its ``config.json``, which decide."""

    name: str
    """A label; ``name@3L`` has 3 layers."""
    config: dict[str, Any]
    """Fields of ``config.json``, number of layers included."""


class World(UserModel):
    """Degrees of parallelism; their product is the number of ranks."""

    dp: int = Field(default=1, ge=1)
    """Data-parallel ranks."""
    tp: int = Field(default=1, ge=1)
    """Tensor-parallel ranks (DeepSpeed AutoTP)."""
    sp: int = Field(default=1, ge=1)
    """Sequence-parallel ranks (Ulysses)."""
    pp: int = Field(default=1, ge=1)
    """Pipeline stages."""


class ForwardShape(UserModel):
    """Sequences of one rank's forward, and tokens of each, whole also where ranks share them (``world.sp``)."""

    size: int = Field(ge=1)
    """Sequences."""
    length: int = Field(ge=1)
    """Tokens of each, padding included."""


class PassedMoments(UserModel):
    """What of a training run was measured besides its steps (``bench`` measures steps alone)."""

    evaluation: ForwardShape | None = None
    """The largest forward of the evaluations that were measured. None: none was."""
    pinned: ForwardShape | None = None
    """The largest forward of the loss that is stored with a checkpoint, and met again at a resume. None: neither was
    measured."""
    saved_after_evaluation: bool = False
    """Whether an evaluation came right before the save that was measured."""
    resumed: bool = False
    """Whether a resume was measured."""
    exported: bool = False
    """Whether the export was."""


class JobSpec(UserModel):
    """One measuring job. A field left out has the default of the records' table.

    Always: gradient clipping 1.0, learning rate 1e-5, weight decay 0.01, random token ids.
    """

    id: str = ""
    """Names the job within its file; a run is resumed by it."""
    model: JobModel
    engine: Engine = "deepspeed"  # or torch: plain PyTorch on one device or under DDP
    precision: Precision = "bf16"
    """bf16 and fp16: DeepSpeed's engines; bf16-autocast: fp32 weights under DeepSpeed's ``torch_autocast``."""
    grad_accum_dtype: Literal["fp32"] | None = None
    bf16_master_weights_and_grads: bool = False
    bf16_optimizer_states: bool = False
    """DeepSpeed's keys of these names (``data_types``, ``bf16``)."""
    micro_batch_size: int = Field(default=1, ge=1)
    """Sequences per data-parallel rank per forward."""
    seq_len: int = Field(ge=1)
    """Tokens of one whole sequence; with ``sp`` ranks each holds ``seq_len / sp``."""
    grad_accum_steps: int = Field(default=1, ge=1)
    """Micro-batches of one optimizer step."""
    attention: Attention = "sdpa"
    """transformers' attention implementation."""
    attention_mask: bool = False  # all ones
    masked: bool = False
    """Whether the masks hid something (padding, or other documents of a pack), as in a real run."""
    activation_checkpointing: Checkpointing = "none"
    """full: ``gradient_checkpointing_enable`` with ``use_reentrant=False``."""
    checkpoint_every: int = Field(default=1, ge=1)
    checkpoint_reentrant: bool = False
    """Its ``every_n_layers`` and ``use_reentrant``."""
    loss: Loss = "hf"
    """hf: the model's own; chunked: DeepSpeed's; liger: fused linear cross-entropy."""
    kernels: Literal["hf", "liger"] = "hf"
    """Whose norms, rotary positions and MLPs."""
    tiled_mlp: bool = False
    """Whether MLPs took a stretch of each sequence at a time."""
    offload_activations: Literal["none", "cpu"] = "none"
    """Where the inputs of checkpointed layers lay until backward."""
    shifted_logits: bool = False
    """Whether the loss copies the fp32 logits to shift them, as transformers up to 4.48 did."""
    method: Method = FullMethod()
    """full, lora or qlora."""
    optimizer: Optimizer = "adamw"
    """adamw is DeepSpeed's FusedAdam."""
    momentum: float = Field(default=0.0, ge=0, lt=1)  # of sgd
    zero: ZeroSpec = ZeroSpec(stage=0)
    """``zero_optimization`` keys; DeepSpeed's default where absent."""
    world: World = World()
    alloc_conf: str = ""  # value of PYTORCH_CUDA_ALLOC_CONF
    cap_bytes: int | None = Field(default=None, ge=1)
    """The job ran under a device memory cap of that many bytes."""
    steps: int = Field(default=2, ge=1)
    """Optimizer steps measured."""
    undefined_weights: bool = False
    """Whether weights that ZeRO-3 splits were left undefined and read as NaN: DeepSpeed then takes every step for an
    overflow and discards it, and no optimizer state comes to be."""
    halved_weights: bool = False
    """Whether weights that ZeRO-3 splits were made in bf16 where fp32 was asked for (``weights_were_halved``)."""
    keep_outputs: bool = True
    """Whether the loop held the model's output until after the step, as the measuring program of records does."""
    retain: RetainSpec = RetainSpec()
    """Methods against forgetting that the run was trained with."""
    passes: PassedMoments | None = None
    """What was measured besides steps. None: nothing."""
    hardware: HardwareSpec = HardwareSpec()
    """Only in jobs made from a user's spec: what the estimate beside the measurement is held against."""

    @model_validator(mode="after")
    def _marks_only_where_split(self) -> Self:
        for name in ("undefined_weights", "halved_weights"):
            if getattr(self, name) and self.zero.stage != 3:
                raise ValueError(f"{name} is for zero.stage 3, which splits weights; set it to false")
        return self

    @field_validator("zero", mode="before")
    @classmethod
    def _as_deepspeed_spells(cls, value: Any) -> Any:
        return renamed(value) if isinstance(value, dict) else value

    @property
    def layout(self) -> Layout:
        return Layout(dp=self.world.dp, tp=self.world.tp, sp=self.world.sp, pp=self.world.pp)


@dataclass(frozen=True, slots=True)
class PhaseReading:
    """Bytes of one phase on one rank: highest inside it, and live at its end. None: not a reading of this device."""

    phase: str
    allocated_peak_bytes: int
    allocated_end_bytes: int
    reserved_peak_bytes: int | None = None
    reserved_end_bytes: int | None = None
    alloc_retries: int | None = None
    """How often the CUDA caching allocator emptied its cache to go on, in this phase."""
    used_peak_bytes: int | None = None
    """What the driver counted at the phase's end, with what torch had reserved at most instead of at the end."""

    @property
    def is_step(self) -> bool:
        return self.phase.startswith("step")


@dataclass(frozen=True, slots=True)
class Measured:
    """What a job measured; ``extra`` keeps fields that this version does not know."""

    outcome: Outcome
    phases: tuple[PhaseReading, ...] = ()
    numel_total: int | None = None
    numel_trainable: int | None = None
    train_allocated_peak_bytes: int | None = None
    allocated_peak_bytes: int | None = None
    reserved_peak_bytes: int | None = None
    context_bytes_total_minus_free: int | None = None
    host_rss_peak_bytes: int | None = None
    seconds_per_step: float | None = None
    error: str | None = None
    """One line of what stopped the job, where the outcome is not ok."""
    extra: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> Measured:
        known = {item.name for item in fields(cls)} - {"extra", "phases"}
        return cls(
            phases=tuple(_phase_from_dict(phase) for phase in raw.get("phases", ())),
            extra={key: value for key, value in raw.items() if key not in known | {"phases"}},
            **{key: value for key, value in raw.items() if key in known},
        )

    def to_dict(self) -> dict[str, Any]:
        plain = {
            item.name: getattr(self, item.name)
            for item in fields(self)
            if item.name not in ("phases", "extra") and getattr(self, item.name) is not None
        }
        phases = [
            {item.name: value for item in fields(phase) if (value := getattr(phase, item.name)) is not None}
            for phase in self.phases
        ]
        return plain | {"phases": phases} | self.extra


@dataclass(frozen=True, slots=True)
class Record:
    """A measured job: its spec, the versions and device it ran on, and the bytes."""

    id: str
    spec: JobSpec
    measured: Measured
    env: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "spec": self.spec.model_dump(mode="json", exclude_unset=True),
            "measured": self.measured.to_dict(),
            "env": self.env,
        }


@dataclass(frozen=True, slots=True)
class UnreadRecord:
    """A record whose spec this version does not understand: its figures, and why."""

    id: str
    reason: str
    measured: Measured


_STATE_BYTES = {"adamw": 8, "adamw_torch": 8, "adamw_torch_fused": 8, "adafactor": 4, "adamw_8bit": 2}
"""What optimizers keep for an element on the device that is trained on (``memory/optimizers.py``)."""


def steps_were_skipped(record: Record) -> bool:
    """Whether DeepSpeed discarded the record's optimizer steps, so that its optimizer states never came to be.

    Under ZeRO-3 the measuring program left weights undefined; where that reads as NaN, so do the gradients, and
    DeepSpeed takes it for an overflow. The states are made in the first step that is not discarded: if the bytes after
    step 1 grew by less than half of them, it was. (An optimizer without states does not tell.)
    """
    spec, measured = record.spec, record.measured
    if spec.undefined_weights:
        return True
    if spec.zero.stage != 3 or spec.optimizer not in _STATE_BYTES or not measured.numel_trainable:
        return False
    ends = {phase.phase: phase.allocated_end_bytes for phase in measured.phases}
    last = f"step1.micro{spec.grad_accum_steps}"
    if not {before := f"{last}.backward", after := f"{last}.optimizer_step"} <= ends.keys():
        return False
    grew = ends[after] - ends[before]
    states = _STATE_BYTES[spec.optimizer] // (2 if spec.bf16_optimizer_states else 1)
    return 2 * grew < states * shard(measured.numel_trainable, spec.layout.zero_degree)


def weights_were_halved(record: Record) -> bool:
    """Whether an fp32 run under ZeRO-3 was built with weights of two bytes.

    The first measuring program told ``zero.Init`` a dtype, as the trainer does not; on a CPU without fp16 DeepSpeed
    0.19.8 then takes bf16 (partition_parameters.py, ``_set_dtype``): after loading each element has less than 4 bytes.
    """
    spec, measured = record.spec, record.measured
    if spec.zero.stage != 3 or spec.precision not in ("fp32", "bf16-autocast") or spec.method.kind == "qlora":
        return False  # weights of four bits are split by the engine, as they are
    if spec.halved_weights or not measured.numel_total:
        return spec.halved_weights
    loaded = next((phase.allocated_end_bytes for phase in measured.phases if phase.phase == "model_load"), None)
    # a tied head is loaded too, so the model's elements are a lower bound of what is held
    return loaded is not None and loaded < 4 * shard(measured.numel_total, spec.layout.zero_degree)


def peaks_of(phases: Iterable[PhaseReading]) -> dict[str, int]:
    """The record's summary figures: highest of the step phases, highest of all, highest reserved."""
    phases = tuple(phases)
    steps = [phase.allocated_peak_bytes for phase in phases if phase.is_step]
    reserved = [phase.reserved_peak_bytes for phase in phases if phase.reserved_peak_bytes is not None]
    summary = {"allocated_peak_bytes": max((phase.allocated_peak_bytes for phase in phases), default=0)}
    if steps:
        summary["train_allocated_peak_bytes"] = max(steps)
    if reserved:
        summary["reserved_peak_bytes"] = max(reserved)
    return summary


def read_records(path: Path | str) -> list[Record]:
    """Every record of a JSONL file, in order.

    Raises:
        SpecError: a line is no JSON, or no record; the text names file, line and field.
    """
    return [_record_from_dict(raw, where) for where, raw in _json_lines(Path(path))]


def read_records_leniently(path: Path | str) -> list[Record | UnreadRecord]:
    """As ``read_records``, but a record whose spec is not understood comes with the reason instead of an error."""
    found: list[Record | UnreadRecord] = []
    for where, raw in _json_lines(Path(path)):
        try:
            found.append(_record_from_dict(raw, where))
        except SpecError as error:
            measured = raw.get("measured")
            if not isinstance(raw.get("spec"), dict) or not isinstance(measured, dict) or "outcome" not in measured:
                raise
            name = str(raw.get("id", raw["spec"].get("id", where)))
            found.append(UnreadRecord(name, str(error), Measured.from_dict(measured)))
    return found


def read_jobs(path: Path | str) -> list[JobSpec]:
    """Every job of a JSONL file, whose lines are specs, bare or under ``spec`` (so a records file is a jobs file).

    A job without an ``id`` is named by its line. A record is run again under its own conditions: where its steps were
    discarded or its weights halved, so they are again. Raises SpecError as ``read_records`` does.
    """
    jobs = []
    for where, raw in _json_lines(Path(path)):
        spec = {**raw["spec"], "id": raw.get("id", raw["spec"].get("id", ""))} if "spec" in raw else raw
        job = _job_from_dict(spec, where)
        if "measured" in raw:
            record = _record_from_dict(raw, where)
            marks = {"undefined_weights": steps_were_skipped(record), "halved_weights": weights_were_halved(record)}
            job = job.model_copy(update={name: True for name, holds in marks.items() if holds})
        jobs.append(job if job.id else job.model_copy(update={"id": where.rsplit(" ", 1)[1]}))
    repeated = {job.id for job in jobs if sum(other.id == job.id for other in jobs) > 1}
    if repeated:
        raise SpecError(f"{path}: job ids must be unique, but {min(repeated)!r} occurs more than once")
    return jobs


def append_record(path: Path | str, record: Record) -> None:
    """Adds one line to a records file, whole or not at all in the face of a crash (one write, flushed)."""
    with Path(path).open("a", encoding="utf-8") as file:
        file.write(json.dumps(record.to_dict()) + "\n")


def _phase_from_dict(raw: dict[str, Any]) -> PhaseReading:
    known = {item.name for item in fields(PhaseReading)}
    return PhaseReading(**{key: value for key, value in raw.items() if key in known})


def _record_from_dict(raw: dict[str, Any], where: str) -> Record:
    missing = [key for key in ("spec", "measured") if not isinstance(raw.get(key), dict)]
    if missing:
        raise SpecError(f"{where}: a record needs {missing[0]!r}; a file of jobs is run by `vramplan bench run` first")
    spec = _job_from_dict(raw["spec"], where)
    if "outcome" not in raw["measured"]:
        raise SpecError(f"{where}: measured.outcome is missing; it says ok, oom, error or died")
    return Record(raw.get("id", spec.id), spec, Measured.from_dict(raw["measured"]), raw.get("env", {}))


def _job_from_dict(raw: dict[str, Any], where: str) -> JobSpec:
    try:
        return JobSpec.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise SpecError(f"{where}: {place}: {first['msg']}") from error


def _json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise SpecError(f"{path}: cannot be read ({error.strerror})") from error
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            raw = json.loads(line)
        except json.JSONDecodeError as error:
            raise SpecError(f"{where}: is not JSON ({error.msg})") from error
        if not isinstance(raw, dict):
            raise SpecError(f"{where}: is JSON, but not an object")
        yield where, raw
