"""Which samples an optimizer step sees: a pure function of (seed, step), whatever the plan.

The epochs, each a permutation of all samples, are laid end to end and cut into global batches. A batch that crosses
the end of an epoch takes its rest from the next one, so every batch has the same number of samples, none is dropped,
and after n samples each has been seen floor(n / num_samples) times or once more. Ranks and micro-batches only cut a
batch; resuming needs no cursor but the step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from vramplan.errors import SpecError
from vramplan.spec.layout import shard


def global_batch(seed: int, step: int, num_samples: int, batch_size: int) -> tuple[int, ...]:
    """Ids, in order, of the samples of optimizer step ``step`` (counted from 0)."""
    first = step * batch_size
    return tuple(_sample_at(seed, position, num_samples) for position in range(first, first + batch_size))


def epoch_of(step: int, num_samples: int, batch_size: int) -> int:
    """The epoch in which step ``step`` begins, counted from 0."""
    return step * batch_size // num_samples


def steps_of_epochs(epochs: float, num_samples: int, batch_size: int) -> int:
    """Optimizer steps in which every sample is seen ``epochs`` times (the last step is filled from the next epoch)."""
    return max(1, -(-round(epochs * num_samples) // batch_size))


def rank_slice(ids: Sequence[int], rank: int, dp_degree: int) -> tuple[int, ...]:
    """The part of a global batch that data-parallel rank ``rank`` computes.

    Raises:
        SpecError: the batch cannot be cut into equal parts.
    """
    if len(ids) % dp_degree:
        raise SpecError(
            f"global_batch_size {len(ids)} cannot be shared equally by {dp_degree} ranks: "
            f"make it a multiple of {dp_degree}"
        )
    share = shard(len(ids), dp_degree)
    return tuple(ids[rank * share : (rank + 1) * share])


def micro_batches(ids: Sequence[int], micro_batch_size: int) -> Iterator[tuple[int, ...]]:
    """A rank's part cut into micro-batches; the last may be smaller."""
    for start in range(0, len(ids), micro_batch_size):
        yield tuple(ids[start : start + micro_batch_size])


def _sample_at(seed: int, position: int, num_samples: int) -> int:
    epoch, offset = divmod(position, num_samples)
    return int(permutation(seed, epoch, num_samples)[offset])


@lru_cache(maxsize=16)
def permutation(seed: int, epoch: int, num_samples: int, source: int = 0) -> NDArray[np.int64]:
    """The order of one epoch of one source. RandomState's streams are frozen across numpy's versions (NEP 19),
    Generator's not."""
    entropy = [seed, epoch, source] if source else [seed, epoch]
    state = np.random.RandomState(np.random.MT19937(np.random.SeedSequence(entropy)))
    return state.permutation(num_samples)
