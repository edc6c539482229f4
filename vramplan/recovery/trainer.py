"""``FitCallback``: transformers' Trainer (and TRL's) asks whether a run fits, and says how true that was."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import TrainerCallback

from vramplan.errors import NoPlanError, UnknownNameError
from vramplan.facts.devices import resolve_node
from vramplan.facts.resolve import resolve_architecture
from vramplan.measure.probe import PhaseProbe
from vramplan.measure.record import PhaseReading
from vramplan.memory.estimate import UncoveredError
from vramplan.recovery.translate import run_of_trainer
from vramplan.search.fit import Fit, fit_run
from vramplan.units import format_bytes

MEASURED_STEPS = 2
"""The first makes the optimizer's states, the second meets them."""
REPORT = "vramplan_fit.json"


class FitCallback(TrainerCallback):  # type: ignore[misc]
    """Given to a Trainer's ``callbacks``, it estimates the run before the first step and refuses one that does not fit.

    The first two optimizer steps are measured; ``comparison`` holds then, for each phase, predicted and measured bytes,
    and ``vramplan_fit.json`` in the output directory as well.

    Args:
        seq_len: tokens of the longest sequence; None: ``max_length`` of TRL's arguments.
        on_misfit: ``raise`` NoPlanError, or ``warn`` and train nevertheless.
        attention_mask: whether batches come with a mask, as those of transformers' collators do.
    """

    def __init__(
        self,
        seq_len: int | None = None,
        on_misfit: Literal["raise", "warn"] = "raise",
        attention_mask: bool = True,
    ) -> None:
        self._seq_len, self._on_misfit, self._attention_mask = seq_len, on_misfit, attention_mask
        self.fit: Fit | None = None
        """The answer; None where the run is not one that the arithmetic covers (``note`` says why)."""
        self.note = ""
        self.comparison: list[dict[str, Any]] = []
        self._probe: PhaseProbe | None = None
        self._phase = ExitStack()
        self._held_before = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Asks, and begins to measure."""
        self._ask(args, model)
        if self.fit is not None:
            self._held_before = 0 if args.device.type == "cuda" else _bytes_of(model)
            self._probe = PhaseProbe(args.device)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Forward and backward of all micro-batches of a step are one phase."""
        self._open(f"step{state.global_step + 1}.forward and backward")

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The step's end is another."""
        self._open(f"step{state.global_step + 1}.optimizer_step")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Ends a step; after the last one that is measured, compares."""
        self._phase.close()
        if self._probe is not None and state.global_step >= MEASURED_STEPS:
            self._finish(args)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Of a run shorter than what is measured."""
        self._phase.close()
        if self._probe is not None:
            self._finish(args)

    def _ask(self, args: Any, model: Any) -> None:
        try:
            run = run_of_trainer(args, model, self._seq_len, self._attention_mask)
            self.fit = fit_run(run, resolve_node(run.hardware), resolve_architecture(run))
        except (UncoveredError, UnknownNameError) as error:  # the latter: a family or a GPU of no catalogue
            self.note = f"vramplan: whether this run fits is not known: {error}"
            print(self.note)  # noqa: T201  # as Trainer's own progress callback does
            return
        self.note = str(_sentence(self.fit))
        if self.fit.fits or self._on_misfit == "warn":
            print(f"vramplan: {self.note}")  # noqa: T201
            return
        raise NoPlanError(self.note)

    def _open(self, name: str) -> None:
        self._phase.close()
        if self._probe is not None:
            self._phase = ExitStack()
            self._phase.enter_context(self._probe.phase(name))

    def _finish(self, args: Any) -> None:
        assert self._probe is not None
        assert self.fit is not None
        self._probe.close()
        self.comparison = [self._compared(reading, self.fit) for reading in self._probe.readings]
        self._probe = None
        if args.process_index == 0:
            directory = Path(args.output_dir)
            directory.mkdir(parents=True, exist_ok=True)
            (directory / REPORT).write_text(json.dumps(self.comparison, indent=2) + "\n", encoding="utf-8")

    def _compared(self, reading: PhaseReading, fit: Fit) -> dict[str, Any]:
        step, _, kind = reading.phase.partition(".")
        kinds = ("forward", "backward") if kind.startswith("forward") else (kind,)
        predicted = max(
            each.peak_bytes
            for each in fit.estimate.phases
            if each.phase.startswith(f"{step}.") and each.phase.endswith(kinds)
        )
        measured = reading.allocated_peak_bytes + self._held_before
        return {"phase": reading.phase, "predicted_bytes": predicted, "measured_bytes": measured}


def _sentence(fit: Fit) -> str:
    used, capacity = fit.estimate.used_peak_bytes, fit.estimate.capacity_bytes
    if fit.fits:
        return f"fits: {format_bytes(used)} of the {format_bytes(capacity)} that each rank may use"
    ways = "; or ".join(str(way) for way in fit.remedies)
    return (
        f"does not fit: {fit.estimate.peak.name} needs {format_bytes(used)} of the {format_bytes(capacity)} that each "
        f"rank may use{'; what would: ' + ways if ways else ''}"
    )


def _bytes_of(model: torch.nn.Module) -> int:
    """Of parameters and buffers, each storage once."""
    storages = {each.untyped_storage() for each in (*model.parameters(), *model.buffers())}
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
