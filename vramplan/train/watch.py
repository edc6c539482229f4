"""What evaluations have said so far: which step was best, and whether what must not be forgotten is being forgotten."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from vramplan.measure.run_dir import read_events
from vramplan.retain.early_stop import rose_too_far, should_stop
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
        """The step after which ``training.best_on`` was lowest (the earliest of equals) among those at which
        ``retain.early_stop`` allows what was forgotten (among all, where it allows none); None where none is asked."""
        losses = self.losses.get(self.run.training.best_on or "", {})
        after = {step: loss for step, loss in losses.items() if step}
        allowed = {step: loss for step, loss in after.items() if not self._forgot_too_much(step)} or after
        return min(allowed, key=lambda step: (allowed[step], step)) if allowed else None

    @property
    def worse_than_before(self) -> str | None:
        """What is to be said where the best step has a higher loss than the model had before training; None: it has
        not, or no evaluation was made then."""
        name, best = self.run.training.best_on, self.best_step
        losses = self.losses.get(name or "", {})
        if best is None or 0 not in losses or losses[best] <= losses[0]:
            return None
        compared = (
            f"is worse on {name} than the model before training: a loss of {losses[best]:.4f} against {losses[0]:.4f}"
        )
        if min(loss for step, loss in losses.items() if step) > losses[0]:
            return f"every checkpoint {compared}"
        return f"the best checkpoint that retain.early_stop allows, of step {best}, {compared}"

    @property
    def stop_reason(self) -> str | None:
        """The key that asks for the run's end now, and the set that it watches; None: it goes on."""
        early, training = self.run.retain.early_stop, self.run.training
        if early is not None:
            losses = [loss for _, loss in sorted(self.losses.get(early.set, {}).items())]
            if should_stop(losses, early.max_rise_frac, early.patience):
                return f"retain.early_stop on {early.set}"
        best = self.best_step
        if training.patience is None or best is None:
            return None
        since = sum(step > best for step in self.losses[training.best_on or ""])
        return f"training.patience on {training.best_on}" if since >= training.patience else None

    def _forgot_too_much(self, step: int) -> bool:
        early = self.run.retain.early_stop
        losses = {} if early is None else self.losses.get(early.set, {})
        if early is None or not {0, step} <= losses.keys():
            return False
        return rose_too_far(losses[step], losses[0], early.max_rise_frac)
