"""One rank that trains, and meets a wall: real runs of the trainer, one after the other, in one process.

``python -m support.wall_worker ROOT MODEL STAGE[:WHERE] ...`` with WHERE ``forward`` or ``backward``: from the second
micro-batch of the second step on the last layer asks there for 2**50 bytes whenever it is given more than 2 sequences,
which torch's allocator refuses as it refuses whatever is too much. ``held``: and something holds on to the activations.
``python``: Python is asked for as much, whose error has no words.
Without WHERE micro-batches are of 2 sequences from the second step on, and no wall is met.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from vramplan.facts.devices import resolve_node
from vramplan.facts.resolve import resolve_architecture
from vramplan.measure.run_dir import RunDir
from vramplan.search.planner import make_plan
from vramplan.spec.load import load_run
from vramplan.train import session
from vramplan.train.engine import TrainEngine
from vramplan.train.loop import Loop
from vramplan.train.status import RankStatus

from support.training import write_spec

MOST_ROWS = 2
_REFUSED = 2**50
_held: list[Any] = []


def main() -> None:
    root, model, *tasks = sys.argv[1:]
    for task in tasks:
        stage, _, where = task.partition(":")
        directory = Path(root) / task.replace(":", "-")
        directory.mkdir()
        spec = write_spec(
            directory / "spec.yaml",
            Path(model),
            int(stage),
            micro_batch_size=4,
            hardware={"gpu": "cpu", "gpus_per_node": 1},
            training={"max_steps": 4, "save_every": 100},
        )
        run = load_run(spec)
        plan = make_plan(run, resolve_node(run.hardware), resolve_architecture(run))
        run_dir = RunDir(directory)
        plan.save(run_dir.plan)
        session.Loop = _loop(where)  # type: ignore[misc]
        try:
            session.train(plan, run_dir, RankStatus(run_dir.status_of(0), 0), resuming=False)
        except RuntimeError as error:
            (directory / "error.txt").write_text(str(error))


def _loop(where: str) -> type[Loop]:
    class WalledLoop(Loop):
        def step(self, step: int) -> Any:
            if step == 1 and not where:
                self._micro_batch_size = MOST_ROWS
            if step == 1 and where:
                _build_wall(self.engine, where)
            return super().step(step)

    return WalledLoop


def _build_wall(engine: TrainEngine, where: str) -> None:
    calls = []

    def after_last_layer(_module: Any, _inputs: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        calls.append(len(hidden))
        if len(calls) < 2 or len(hidden) <= MOST_ROWS or not hidden.requires_grad:
            return
        if where == "backward":
            hidden.register_hook(_ask_for_too_much)
            return
        if where == "held":
            _held.append(hidden)
        if where == "python":
            bytearray(_REFUSED)
        _ask_for_too_much(hidden)

    engine.module.model.layers[-1].register_forward_hook(after_last_layer)


_ask_for_too_much: Callable[[torch.Tensor], Any] = lambda _: torch.empty(_REFUSED, dtype=torch.uint8)  # noqa: E731


if __name__ == "__main__":
    main()
    os._exit(0)  # as the trainer leaves: a shutdown with a profiler on, or a graph held, may crash
