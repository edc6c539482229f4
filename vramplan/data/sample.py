"""A sequence of tokens, and which of them are learnt."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """One sequence: ``ids`` (int64) and ``trained`` (bool), of equal length; ``where`` names its row.

    ``trained[i]`` says that token ``i`` counts as a target, predicted from the tokens before it.
    """

    where: str
    ids: NDArray[np.int64]
    trained: NDArray[np.bool_]
    num_cut: int = 0
    """Tokens that did not fit into the sequence length."""
    weight: float = 1.0
    """How much each of its targets counts in the loss (of a pack: see ``weights``)."""
    doc_lengths: tuple[int, ...] = ()
    """Of a pack: tokens of each document in it, in order; the first token of each is not trained."""
    doc_weights: tuple[float, ...] = ()
    """Of a pack: the documents' weights."""
    shown: NDArray[np.int64] | None = None
    """What the model is shown instead of ``ids`` (token dropout); targets stay those of ``ids``."""

    @property
    def num_tokens(self) -> int:
        return len(self.ids)

    @property
    def num_targets(self) -> int:
        """Tokens in the loss: the first of a sequence is never predicted."""
        return int(self.trained[1:].sum())

    @property
    def target_weight(self) -> float:
        """Sum of its targets' weights; ``num_targets`` where nothing is weighted."""
        if not self.doc_weights:
            return self.num_targets * self.weight
        return float((self.weights * self.trained)[1:].sum())

    @property
    def weights(self) -> NDArray[np.float64]:
        """Each token's weight in the loss if it is a target."""
        if not self.doc_weights:
            return np.full(len(self.ids), self.weight)
        return np.repeat(np.asarray(self.doc_weights), self.doc_lengths)

    @property
    def positions(self) -> NDArray[np.int64]:
        """Positions that restart with every document."""
        return np.concatenate([np.arange(length) for length in self.doc_lengths or (len(self.ids),)])
