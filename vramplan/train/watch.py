"""What evaluations have said so far: which step was best, and whether what must not be forgotten is being forgotten."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from vramplan.measure.run_dir import read_events
from vramplan.retain.early_stop import should_stop
from vramplan.spec.data import HELD_OUT
from vramplan.spec.run import RunSpec


@dataclass
class Watch:
    """Losses of each held-out set by the number of steps done; 0 is before training."""

    run: RunSpec
    losses: dict[str, dict[int, float]] = field(default_factory=dict)

    def add(self, name: str, steps_done: int, loss: float) -> None:
        self.losses.setdefault(name, {})[steps_done] = loss

    def reread(self, metrics: Path, steps_done: int) -> None:
        """Takes over what a run that is being resumed wrote down of its first ``steps_done`` steps."""
        for event in read_events(metrics):
            if event["event"] == "evaluation" and event["step"] <= steps_done:
                self.add(event.get("set", HELD_OUT), event["step"], event["loss"])

    @property
    def best_step(self) -> int | None:
        """The step after which ``training.best_on`` was lowest (the earliest of equals); None where none is asked."""
        losses = self.losses.get(self.run.training.best_on or "", {})
        after = {step: loss for step, loss in losses.items() if step}
        return min(after, key=lambda step: (after[step], step)) if after else None

    @property
    def must_stop(self) -> bool:
        """Whether ``retain.early_stop`` says that enough is forgotten."""
        early = self.run.retain.early_stop
        if early is None:
            return False
        losses = [loss for _, loss in sorted(self.losses.get(early.set, {}).items())]
        return should_stop(losses, early.max_rise_frac, early.patience)
