"""The moments between steps: evaluation, save, resume and export, as the trainer makes them.

Sources: ``train/evaluate.py``, ``train/checkpoint.py``, ``train/export.py``; deepspeed 0.19.8, runtime/engine.py
(``save_checkpoint``, ``load_checkpoint``), checkpoint_engine/torch_checkpoint_engine.py, and ``state_dict`` and
``load_state_dict`` of each stage's optimizer; torch 2.13, serialization.py (``_save`` brings one storage at a time to
the host, ``_load`` reads every storage of a file) and optim/optimizer.py (``load_state_dict``: what lies on the
parameter's device in its format is taken as it is, else copied).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from vramplan.memory import labels
from vramplan.memory.evaluation import Evaluated, evaluated, evaluated_after, evaluating
from vramplan.memory.gathered import MICROS
from vramplan.memory.job import Job
from vramplan.memory.moments import Bytes, Parts, Stretch, at_point, merged
from vramplan.memory.passes import Batch, Passes, job_of_batch
from vramplan.memory.size import Size
from vramplan.memory.tape import Point
from vramplan.memory.term import Phase

Points = tuple[tuple[Size, Point], ...]
Passed = tuple[Stretch, Size]
"""A phase, and the values of the size polynomials at its batch."""


@dataclass(frozen=True, slots=True)
class Files:
    """Bytes of a checkpoint's files on one rank."""

    shared: int = 0
    """The file of the model, which every rank reads (``mp_rank_00_model_states.pt``)."""
    own: int = 0
    """The rank's part of the optimizer's state (``..._optim_states.pt``)."""
    largest_shared: int = 0
    """The largest storage of the model's file, which rank 0 writes."""
    largest_own: int = 0
    """The largest of the rank's own."""


@dataclass(frozen=True, slots=True)
class Written:
    """Bytes of whole weights as they are exported."""

    copied: int = 0
    """All that rank 0 has in the host's memory to write them."""
    largest: int = 0
    """The largest tensor that is gathered for it (ZeRO-3)."""
    together: tuple[int, int] = (0, 0)
    """Copies so far, and the tensor that is gathered, when both are most."""


@dataclass(frozen=True, slots=True)
class Standing:
    """What of one rank's engine stays from phase to phase."""

    started: Bytes = field(default_factory=Bytes)
    """When it is made."""
    between: Bytes = field(default_factory=Bytes)
    """After optimizer steps, without gathered weights."""
    gathered: Parts = field(default_factory=Bytes)
    """Small tensors that are whole after a step (ZeRO-3)."""
    kept: Parts = field(default_factory=Bytes)
    """By methods against forgetting."""
    files: Files = Files()
    states: Parts = field(default_factory=Bytes)
    """The optimizer's states, as loading a checkpoint makes them."""
    written: Written = Written()


def moments_between(job: Job, standing: Standing, passes: Passes, ranks_per_node: int) -> list[Passed]:
    """The phases that a run passes besides its steps, in their order. Of what rank 0 alone has in the host's memory
    each of ``ranks_per_node`` is given a share, unless the device is the host."""
    sharers = ranks_per_node if job.device != "cpu" else 1
    found: list[Passed] = []
    if passes.evaluation is not None:
        found.append(_Between(job, standing, passes.evaluation).evaluation())
    if passes.pinned is not None:
        found.append(_Between(job, standing, passes.pinned).save(passes.saves_after_evaluation, sharers))
        if passes.resumes:
            found.append(_Between(job, standing, passes.pinned).resume())
    if passes.exports:
        found.append(_Between(job, standing, Batch(1, 1)).export(sharers))
    return found


class _Between:
    """Phases with forwards of one batch."""

    def __init__(self, job: Job, standing: Standing, batch: Batch) -> None:
        self.job, self.standing = job, standing
        self.of_batch = job_of_batch(job, batch)

    def evaluation(self) -> Passed:
        stretch, found = self._open("evaluation", Phase.EVALUATION), self._after_steps
        self._see(stretch, found.points, self.standing.between)
        return self._close(stretch, self.standing.between, at_point(found.end))

    def save(self, after_evaluation: bool, sharers: int) -> Passed:
        """The pinned batch's loss, then the files: under ZeRO-3 nothing is whole meanwhile
        (``checkpoint_event_prologue``), and small tensors are again at the end."""
        stretch, between = self._open("save", Phase.SAVE), self.standing.between
        found = self._after_steps
        self._see(stretch, found.later if after_evaluation else found.points, between, "pinned batch, ")
        if self._is_apart:
            files = self.standing.files
            largest = files.largest_own + -(-files.largest_shared // sharers)
            stretch.see("written", between, {labels.HOST_WRITTEN: largest})
        return self._close(stretch, between, self.standing.gathered)

    def resume(self) -> Passed:
        """The model's file, then the rank's own; states are made of what was read; the pinned batch's loss."""
        stretch, standing = self._open("resume", Phase.RESUME), self.standing
        files, started = standing.files, standing.started
        after = merged(started.without(*standing.states), standing.states)
        stretch.see("model file read", started, {labels.HOST_READ: files.shared})
        if not self._is_apart:  # states are what was read
            stretch.see("optimizer file read", started, {labels.HOST_READ: files.own})
        else:
            read = {labels.HOST_READ: files.own or files.shared}
            stretch.see("states copied to the device", started, standing.states, read)
        found = evaluated(evaluating(self.of_batch.shapeless.model_run))
        self._see(stretch, found.points, after, "pinned batch, ")
        return self._close(stretch, after, at_point(found.end))

    def export(self, sharers: int) -> Passed:
        """Whole weights on rank 0's host; under ZeRO-3 they are gathered one by one."""
        stretch, standing = self._open("export", Phase.SAVE), self.standing
        written = standing.written
        copied, whole = (-(-written.copied // sharers), written.largest) if self._is_apart else written.together
        gathered = {labels.GATHERED: whole}
        stretch.see("weights gathered", standing.between, {labels.HOST_EXPORT: copied}, gathered)
        return self._close(stretch, standing.between)

    @property
    def _is_apart(self) -> bool:
        return self.job.device != "cpu"

    @property
    def _after_steps(self) -> Evaluated:
        run = evaluating(self.of_batch.shapeless.model_run)
        return evaluated_after(self.job.shapeless.model_run, run, min(self.job.grad_accum_steps, MICROS))

    def _open(self, name: str, phase: Phase) -> Stretch:
        return Stretch(name, phase, False, host_apart=self._is_apart, held=self.standing.kept)

    def _see(self, stretch: Stretch, points: Points, base: Bytes, prefix: str = "") -> None:
        for _, point in points:
            stretch.see(f"{prefix}{point.where or 'model'}", base, at_point(point))

    def _close(self, stretch: Stretch, *end: Parts) -> Passed:
        stretch.close(*end)
        return stretch, self.of_batch.basis
