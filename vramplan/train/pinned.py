"""The loss on a pinned batch: stored with every checkpoint, and met again before the first step after it is loaded.

Each sequence is evaluated alone and without dropout, so neither the number of ranks nor the stage changes more than
the order in which floats are added. Checksums prove that every tensor is what was written; this proves that each came
to its place.
"""

from __future__ import annotations

from collections.abc import Sequence

from vramplan.data.sample import Sample
from vramplan.errors import CheckpointError
from vramplan.train.checkpoint import Resumed
from vramplan.train.engine import TrainEngine
from vramplan.train.evaluate import evaluate

NUM_SAMPLES = 4
"""Training samples that make the batch: the first ones."""
TOLERANCES = {"fp32": 1e-5, "bf16-autocast": 1e-2, "bf16": 1e-2, "fp16": 2e-3}
"""Relative difference that the order of additions may make. ASSUMED, by the unit roundoff u of the format of the
products: u is 6e-8 in fp32, 4e-3 in bf16, 5e-4 in fp16, and a logit's error is a few u whatever the mean over tokens
takes away again."""


def pinned_loss(engine: TrainEngine, train: Sequence[Sample], pad_id: int) -> float:
    """The loss of the weights as they are; every rank calls."""
    pinned = [train[index] for index in range(min(NUM_SAMPLES, len(train)))]
    return evaluate(engine, pinned, pad_id, micro_batch_size=1).loss


def check_pinned_loss(found: Resumed, loss: float, precision: str) -> None:
    """Raises:
    CheckpointError: the weights that were loaded do not give the loss that they gave when they were saved.
    """
    saved = found.state.pinned_loss
    tolerance = TOLERANCES[precision]
    if not abs(loss - saved) <= tolerance * max(abs(saved), abs(loss)):
        raise CheckpointError(
            f"{found.path}: its pinned batch had loss {saved:.6f} when it was saved and has {loss:.6f} after loading "
            f"(more than {tolerance:.0e} apart), so the state is not the same: nothing was trained; resume with the "
            "plan that made it"
        )
