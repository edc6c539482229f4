"""Hard examples: from the second epoch on, rows are drawn by the loss they last had.

An epoch's draw is a pure function of the seed and of the losses of the steps before the epoch's first sample, which are
kept in a file beside the checkpoints, so a resumed run draws what the uninterrupted one drew.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vramplan.errors import CheckpointError
from vramplan.spec.data import HardExamplesSpec

_LARGEST_EXPONENT = 50.0
"""Beyond it a stuck sample is capped anyway, and exp would overflow."""
_RECORD = np.dtype([("id", "<i8"), ("loss", "<f4")])


def chances(ids: NDArray[np.int64], losses: NDArray[np.float32], size: int, spec: HardExamplesSpec) -> NDArray[Any]:
    """Each of ``size`` samples' chance to be drawn (they add up to 1), from the ``losses`` of their visits in order.

    Softmax of the standardised last loss over the temperature, mixed with the equal chance so that none falls below
    ``floor`` of it. A sample that was seen ``patience`` times without its best loss falling ``min_improvement`` below
    its first is likely noise (a wrong label stays hard) and gets at most ``cap`` equal chances. One that was never
    seen counts as average.
    """
    seen = np.bincount(ids, minlength=size)
    first, last = np.full(size, np.nan), np.full(size, np.nan)
    last[ids] = losses  # numpy keeps the last of repeated indices
    first[ids[::-1]] = losses[::-1]
    best = np.full(size, np.inf)
    np.minimum.at(best, ids, losses)
    known = seen > 0
    if not known.any():
        return np.full(size, 1 / size)
    stuck = (seen >= spec.patience) & (best > (1 - spec.min_improvement) * first)
    if stuck.all():
        return np.full(size, 1 / size)
    judged = known & ~stuck if (known & ~stuck).any() else known  # noise must not set the scale
    mean, deviation = last[judged].mean(), last[judged].std()
    scores = np.where(known, (last - mean) / deviation if deviation > 0 else 0.0, 0.0) / spec.temperature
    drawn = np.exp(np.minimum(scores - scores[~stuck].max(), _LARGEST_EXPONENT))
    drawn /= drawn[~stuck].sum()
    least, num_others = spec.floor / size, int((~stuck).sum())
    most = min(spec.cap / size, (1 - num_others * least) / max(1, size - num_others))
    of_stuck = np.minimum(least + (1 - spec.floor) * drawn, most)
    left = 1 - of_stuck[stuck].sum() - num_others * least
    chance: NDArray[np.float64] = np.where(stuck, of_stuck, least + left * drawn)
    return chance


def draw(chance: NDArray[Any], seed: Sequence[int]) -> NDArray[np.int64]:
    """As many samples as there are, in random order, each floor(n * chance) times or once more (systematic
    resampling, which has the least variance)."""
    random = np.random.RandomState(np.random.MT19937(np.random.SeedSequence(list(seed))))
    size = len(chance)
    edges = np.cumsum(chance)
    points = (np.arange(size) + random.random_sample()) / size * edges[-1]
    drawn = np.minimum(np.searchsorted(edges, points, side="right"), size - 1)
    return np.asarray(drawn[random.permutation(size)], dtype=np.int64)


class LossHistory:
    """The loss of every visit, by step; on rank 0 also in a file."""

    def __init__(self) -> None:
        self._steps: list[NDArray[Any]] = []
        self._path: Path | None = None

    def __len__(self) -> int:
        return len(self._steps)

    def add(self, ids: Sequence[int], losses: Sequence[float]) -> None:
        """What one optimizer step gave, in its order."""
        records = np.zeros(len(ids), dtype=_RECORD)
        records["id"], records["loss"] = ids, losses
        self._steps.append(records)
        if self._path is not None:
            with self._path.open("ab") as file:
                file.write(records.tobytes())

    def before(self, step: int) -> NDArray[Any]:
        """Records of the steps before ``step``."""
        return np.concatenate([np.zeros(0, dtype=_RECORD), *self._steps[:step]])

    def write_to(self, path: Path) -> None:
        """From now on every step is appended to ``path``, which first gets what is known."""
        path.write_bytes(self.before(len(self)).tobytes())
        self._path = path

    @classmethod
    def read(cls, path: Path, num_steps: int, batch_size: int) -> LossHistory:
        """The first ``num_steps`` steps of a file.

        Raises:
            CheckpointError: it has fewer.
        """
        records = np.fromfile(path, dtype=_RECORD) if path.is_file() else np.zeros(0, dtype=_RECORD)
        wanted = num_steps * batch_size
        if len(records) < wanted:
            raise CheckpointError(
                f"{path}: holds the losses of {len(records) // batch_size} steps, but the checkpoint is of step "
                f"{num_steps}: hard_examples cannot go on without them; leave data.hard_examples out, or start anew"
            )
        history = cls()
        history._steps = list(records[:wanted].reshape(num_steps, batch_size))
        return history


class Mining:
    """Orders of epochs that follow the losses so far."""

    def __init__(self, spec: HardExamplesSpec, seed: int) -> None:
        self.spec, self.seed = spec, seed
        self.history = LossHistory()
        self._orders: dict[tuple[int, int], NDArray[np.int64]] = {}

    def order(self, source: int, epoch: int, first: int, size: int, first_step: int) -> NDArray[np.int64]:
        """The samples of one epoch of a source (those with the ids ``first`` to ``first + size - 1``), counted within
        it; ``first_step`` is the step that takes the epoch's first sample."""
        key = (source, epoch)
        if key not in self._orders:
            records = self.history.before(first_step)
            own = records[(records["id"] >= first) & (records["id"] < first + size)]
            chance = chances(own["id"] - first, own["loss"], size, self.spec)
            self._orders = {other: order for other, order in self._orders.items() if other[1] >= epoch - 1}
            self._orders[key] = draw(chance, (self.seed, epoch, source, 1))
        return self._orders[key]
