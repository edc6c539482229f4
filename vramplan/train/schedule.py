"""The learning rate as a function of the optimizer step."""

from __future__ import annotations

import math

from vramplan.spec.training import TrainingSpec


def learning_rate(step: int, total_steps: int, peak_lr: float, training: TrainingSpec) -> float:
    """Rate of optimizer step ``step`` (from 0) of ``total_steps``: linear warm-up, then the schedule's decay from the
    peak towards ``min_lr_frac`` of it, which the step after the last would have."""
    warmup_steps = math.ceil(training.warmup_frac * total_steps)
    if step < warmup_steps:
        return peak_lr * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    floor = training.min_lr_frac
    return peak_lr * (floor + (1 - floor) * _decay(training.schedule, progress))


def _decay(schedule: str, progress: float) -> float:
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return 1 - progress if schedule == "linear" else 1.0
