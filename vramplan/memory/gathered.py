"""Micro-batches under ZeRO-3, whose gathering depends on what came before."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from vramplan.memory import labels
from vramplan.memory.garbage import uncollected
from vramplan.memory.model_run import ModelRun
from vramplan.memory.moments import Bytes
from vramplan.memory.profile import Profile, Runner
from vramplan.memory.size import Size

MICROS = 3
"""Micro-batches of the first step that differ."""


@dataclass(frozen=True)
class GatheredProfiles:
    """Micro-batches under ZeRO-3: the first one ever, the next in its step, those after that; one that follows a step,
    and those after it."""

    first: Profile
    following: Profile
    settled: Profile
    after_step: Profile
    following_later: Profile
    between_steps: dict[str, Size]
    """What is there after an optimizer step."""
    sampled: tuple[Profile, ...]
    """The two backwards before the first step in which the Fisher diagonal is sampled; none without."""
    viewed_in_steps: tuple[Size, Size]
    """What the graph holds in the first and in later optimizer steps of weights that were whole until then."""

    @property
    def whole_between_steps(self) -> Bytes:
        """Of what is there after an optimizer step, the gathered weights."""
        return Bytes({name: size for name, size in self.between_steps.items() if name == labels.GATHERED})


@lru_cache(maxsize=256)
def gathered_profiles(
    run: ModelRun, micros: int, steps_skipped: bool = False, sampling: ModelRun | None = None
) -> GatheredProfiles:
    """The profiles of a run under ZeRO-3, whose gathering depends on what came before."""
    with uncollected():
        return after_steps(Runner(run), micros, steps_skipped, sampling)


def after_steps(
    runner: Runner, micros: int, steps_skipped: bool = False, sampling: ModelRun | None = None
) -> GatheredProfiles:
    """Runs two optimizer steps of so many micro-batches, at most ``MICROS``, under ZeRO-3; of more the others are as
    the last: the first is recorded, the second is the first that gathers ahead, and the third finds what that leaves.
    ``sampling``: the micro-batches before them in which the Fisher diagonal is sampled."""
    sampled = _samples(runner, sampling) if sampling is not None else ()
    first = runner.micro_batch(is_last=micros == 1)
    following = runner.micro_batch(is_last=micros == 2) if micros > 1 else first
    settled = runner.micro_batch() if micros > 2 else following
    viewed = runner.optimizer_step(steps_skipped)
    between = dict(runner.tape.by_label)
    after_step = runner.micro_batch(is_last=micros == 1)
    later = runner.micro_batch() if micros > 1 else after_step
    viewed_later = runner.optimizer_step(steps_skipped)
    return GatheredProfiles(first, following, settled, after_step, later, between, sampled, (viewed, viewed_later))


def _samples(runner: Runner, sampling: ModelRun) -> tuple[Profile, Profile]:
    run = runner.run
    runner.run, runner.ctx.lone_sequence = sampling, sampling.lone_sequence
    found = runner.micro_batch(), runner.micro_batch()
    runner.run, runner.ctx.lone_sequence = run, run.lone_sequence
    return found
