"""What a checkpoint says of its run: the steps done, what must not have changed, and what may."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from vramplan.errors import CheckpointError
from vramplan.spec.run import RunSpec
from vramplan.train.fragments import moments_of

STATE = "state.json"
"""Name of its file in a checkpoint."""


@dataclass(frozen=True, slots=True)
class StateLayout:
    """How the training state is cut among ranks, and which optimizer keeps it: what a new plan may change."""

    world_size: int
    zero_stage: int
    offload_optimizer: str
    offload_param: str
    optimizer: str
    sub_group_size: int
    """Elements that stage 3 keeps in one flat tensor; 0 in other stages."""
    round_robin: bool
    """Whether stages 1 and 2 deal parameters out to the ranks in turn."""

    @classmethod
    def of(cls, run: RunSpec, world_size: int) -> StateLayout:
        stage = run.zero.stage or 0
        return cls(
            world_size=world_size,
            zero_stage=stage,
            offload_optimizer=run.zero.offload_optimizer or "none",
            offload_param=run.zero.offload_param or "none",
            optimizer=run.optimizer.kind,
            sub_group_size=run.zero.sub_group_size if stage == 3 else 0,
            round_robin=run.zero.round_robin_gradients and stage in (1, 2),
        )

    def __str__(self) -> str:
        offloaded = [name for name in ("optimizer", "param") if getattr(self, f"offload_{name}") != "none"]
        offload = f" with {' and '.join(offloaded)} offloaded" if offloaded else ""
        return f"ZeRO {self.zero_stage} on {self.world_size} rank{'s' * (self.world_size > 1)}{offload}"


@dataclass(frozen=True, slots=True)
class RunState:
    """What a checkpoint says of its run: the optimizer steps done, what decides data and numbers, and its layout."""

    step: int
    total_steps: int
    seed: int
    num_samples: int
    global_batch_size: int
    method: str
    model: str
    precision: str
    optimizer_state: str
    """What the optimizer keeps of each weight: optimizers that keep the same may take over from each other."""
    layout: StateLayout
    pinned_loss: float
    """Loss of the weights on the pinned batch (``pinned.py``)."""

    @classmethod
    def of(
        cls,
        run: RunSpec,
        *,
        step: int,
        total_steps: int,
        num_samples: int,
        world_size: int,
        pinned_loss: float = math.nan,
    ) -> RunState:
        moments = moments_of(run.optimizer)
        return cls(
            step=step,
            total_steps=total_steps,
            seed=run.training.seed,
            num_samples=num_samples,
            global_batch_size=run.global_batch_size or 0,
            method=run.method.kind,
            model=run.model,
            precision=run.precision,
            optimizer_state=", ".join(moments or ()) or run.optimizer.kind,
            layout=StateLayout.of(run, world_size),
            pinned_loss=pinned_loss,
        )

    @classmethod
    def read(cls, path: Path) -> RunState:
        """Of the checkpoint in ``path``.

        Raises:
            CheckpointError: another version of vramplan wrote it.
        """
        fields = json.loads((path / STATE).read_text(encoding="utf-8"))
        try:
            return cls(**fields | {"layout": StateLayout(**fields["layout"])})
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"{path / STATE} was written by another version of vramplan") from error


_SAME = ("model", "method", "precision", "optimizer_state", "seed", "num_samples", "global_batch_size")


def check_same_run(state: RunState, expected: RunState, path: Path) -> None:
    """Raises:
    CheckpointError: the checkpoint in ``path`` is of a run that trains something else, or on something else.
    """
    for name in _SAME:
        saved, now = getattr(state, name), getattr(expected, name)
        if saved != now:
            raise CheckpointError(
                f"{path} was made with {name} {saved}, this run has {now}: resume with the plan that made it, "
                "or start in another run directory"
            )
