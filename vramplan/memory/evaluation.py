"""A forward without a graph, as evaluations run it: what is alive when, as polynomials of the batch.

``module.eval()`` and ``torch.no_grad()`` (``train/engine.py``, ``evaluating``): nothing is saved for backward, nothing
is dropped, no layer is checkpointed, and the whole logits are there whatever loss training takes (liger's fused loss
skips them in training alone: liger_kernel/transformers/model/llama.py, ``lce_forward``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from vramplan.memory.activations import undominated
from vramplan.memory.garbage import uncollected
from vramplan.memory.gathered import after_steps
from vramplan.memory.model_run import ModelRun
from vramplan.memory.profile import Runner
from vramplan.memory.size import Size
from vramplan.memory.tape import Point


@dataclass(frozen=True)
class Evaluated:
    """Forwards one after another: the instants that can be highest, and what is left after the last."""

    points: tuple[tuple[Size, Point], ...]
    later: tuple[tuple[Size, Point], ...]
    """Those of a forward that follows another; under ZeRO-3 it finds weights gathered."""
    end: Point


def evaluating(run: ModelRun) -> ModelRun:
    """The model of a training run as it evaluates."""
    return replace(run, checkpointing=False, host_checkpoints=False, fused_loss_rows=0, kl_chunk_tokens=0)


@lru_cache(maxsize=256)
def evaluated(run: ModelRun) -> Evaluated:
    """An evaluation before any step (of an engine that was just made), or where weights stay whole."""
    with uncollected():
        return _evaluate(Runner(run), run)


@lru_cache(maxsize=256)
def evaluated_after(training: ModelRun, run: ModelRun, micros: int) -> Evaluated:
    """An evaluation after optimizer steps of ``training``; under ZeRO-3 what is gathered depends on them."""
    if training.gathers is None:
        return evaluated(run)
    with uncollected():
        runner = Runner(training)
        after_steps(runner, micros)
        return _evaluate(runner, run)


def _evaluate(runner: Runner, run: ModelRun) -> Evaluated:
    """Two batches under ZeRO-3, whose first changes what the next finds gathered; else one."""
    runner.run = run
    ctx, tape = runner.ctx, runner.tape
    ctx.lone_sequence, ctx.windowed, ctx.masked, ctx.tile_rows = (
        run.lone_sequence,
        run.windowed,
        run.masked,
        run.tile_rows,
    )
    tape.training = False
    forwards = [_forward(runner) for _ in range(2 if run.gathers is not None else 1)]
    every = [point for points in forwards for point in points]
    later = undominated([(point.total, point) for point in forwards[-1]])
    return Evaluated(undominated([(point.total, point) for point in every]), later, runner.snapshot("end"))


def _forward(runner: Runner) -> list[Point]:
    runner.tape.points.clear()
    with runner.tape.without_graph():
        runner.forward()
    runner.kept.clear()
    return list(runner.tape.points)
