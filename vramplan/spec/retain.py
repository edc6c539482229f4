"""RetainSpec: what keeps a model from forgetting what it knew; everything is off until it is asked for."""

from __future__ import annotations

from pydantic import Field

from vramplan.spec.base import UserModel
from vramplan.spec.data import Source


class EwcSpec(UserModel):
    """Elastic weight consolidation (Kirkpatrick et al. 2017, arXiv 1612.00796): a spring on each weight, as stiff as
    the weight mattered for general text."""

    weight: float = Field(default=0.01, gt=0)
    """Strength. The Fisher diagonal is scaled to a mean of 1, so that this compares with ``l2sp.weight``."""
    data: Source
    """A general sample: a path, or a source with its options, as in ``data.train``."""
    max_stiffness: float = Field(default=10.0, ge=1)
    """The most that an element of the Fisher diagonal may be, in units of its mean. Without a cut a few weights hold
    nearly all of it, and springs as stiff as that fill the clipped gradient instead of the task."""
    samples: int = Field(default=64, ge=1)
    """Sequences of it that the Fisher diagonal is estimated from (a forward and a backward each, before training)."""


class L2SpSpec(UserModel):
    """L2-SP (Li et al. 2018, arXiv 1802.01483): decay towards the starting point instead of towards zero."""

    weight: float = Field(default=0.01, gt=0)
    """Strength: half of it times the squared distance is added to the loss."""


class KlSpec(UserModel):
    """KL divergence from the base model's next-token distribution on the training batch (as in Li and Hoiem 2016,
    arXiv 1606.09282). With adapters the base is the same model with them switched off; else a frozen copy."""

    weight: float = Field(default=0.1, gt=0)
    """Strength: this times the mean divergence of a target token (in nats) is added to the loss."""


class EarlyStopSpec(UserModel):
    """Stops when a held-out set got worse than it was before training."""

    set: str = "general"
    """Which held-out set is watched: a name of ``data.eval_sets``, ``replay`` (the held-out rows of ``data.replay``) or
    ``held_out``."""
    max_rise_frac: float = Field(default=0.1, gt=0)
    """Rise of its perplexity over the one before training that is still accepted: 0.1 is 10 %."""
    patience: int = Field(default=1, ge=1)
    """Evaluations in a row above it that stop the run."""


class RetainSpec(UserModel):
    """Methods against forgetting; they combine. Adapters, freezing and new blocks are chosen under ``method``."""

    ewc: EwcSpec | None = None
    """Elastic weight consolidation. None: off."""
    l2sp: L2SpSpec | None = None
    """Decay towards the starting weights. None: off."""
    kl: KlSpec | None = None
    """Divergence from the base model. None: off."""
    layer_lr_decay: float = Field(default=1.0, gt=0.0, le=1.0)
    """Each block's rate is this share of the one above it, embeddings below them all (Howard and Ruder 2018,
    arXiv 1801.06146); 1 gives all the same rate."""
    early_stop: EarlyStopSpec | None = None
    """Stop on a retention metric. None: off."""
    interpolate: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of the base weights in what is saved (WiSE-FT, Wortsman et al. 2021, arXiv 2109.01903)."""
