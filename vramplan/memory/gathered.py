"""Micro-batches under ZeRO-3, whose gathering depends on what came before."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from vramplan.memory.garbage import uncollected
from vramplan.memory.model_run import ModelRun
from vramplan.memory.profile import Profile, Runner
from vramplan.memory.size import Size


@dataclass(frozen=True)
class GatheredProfiles:
    """Micro-batches under ZeRO-3: the first one ever, one that follows another in a step, one that follows a step."""

    first: Profile
    following: Profile
    after_step: Profile
    following_later: Profile
    between_steps: dict[str, Size]
    """What is gathered after an optimizer step."""


@lru_cache(maxsize=256)
def gathered_profiles(run: ModelRun, accumulates: bool, steps_skipped: bool = False) -> GatheredProfiles:
    """The profiles of a run under ZeRO-3, whose gathering depends on what came before."""
    with uncollected():
        return _gathered_profiles(run, accumulates, steps_skipped)


def _gathered_profiles(run: ModelRun, accumulates: bool, steps_skipped: bool) -> GatheredProfiles:
    return after_steps(Runner(run), accumulates, steps_skipped)


def after_steps(runner: Runner, accumulates: bool, steps_skipped: bool = False) -> GatheredProfiles:
    """Runs an optimizer step and the micro-batches of a second one under ZeRO-3."""
    first = runner.micro_batch()
    following = runner.micro_batch() if accumulates else first
    runner.kept.clear()
    runner.optimizer_step(steps_skipped)
    between = dict(runner.tape.by_label)
    after_step = runner.micro_batch()
    later = runner.micro_batch() if accumulates else after_step
    return GatheredProfiles(first, following, after_step, later, between)
