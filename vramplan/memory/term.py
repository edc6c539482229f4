"""The vocabulary of the ledger: a term is some bytes, in a place, for some moments, for a reason."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Place(Enum):
    """Where bytes live."""

    DEVICE = "device"
    HOST = "host"
    PINNED = "pinned"
    """Page-locked memory of the host (in simulated traces; the ledger has headings for it, ``labels.PINNED``)."""
    NVME = "nvme"


class Basis(Enum):
    """How far a number is to be trusted."""

    EXACT = "exact"
    """Follows from shapes and dtypes alone."""
    DERIVED = "derived"
    """Follows from reading the source of torch, transformers or DeepSpeed."""
    FITTED = "fitted"
    """Fitted to measurements, which are named."""
    ASSUMED = "assumed"
    """Nobody measured it here; a stated guess."""


class Category(Enum):
    """What the bytes are, in the words of torch's memory trackers."""

    PARAMETER = "parameter"
    GRADIENT = "gradient"
    OPTIMIZER = "optimizer"
    ACTIVATION = "activation"
    LOGITS = "logits"
    COMMUNICATION = "communication"
    TEMPORARY = "temporary"
    OVERHEAD = "overhead"


class Phase(Enum):
    """A stretch of a run, as the record form names them (without step and micro-batch)."""

    MODEL_LOAD = "model_load"
    ENGINE_INIT = "engine_init"
    FORWARD = "forward"
    BACKWARD = "backward"
    OPTIMIZER_STEP = "optimizer_step"
    EVALUATION = "evaluation"
    SAVE = "save"
    RESUME = "resume"


@dataclass(frozen=True, slots=True)
class Term:
    """Some bytes on one rank, alive together at one moment; terms are disjoint and add up."""

    name: str
    num_bytes: int
    category: Category
    basis: Basis
    note: str
    """One line with the formula, its symbols and the source."""
    place: Place = Place.DEVICE


@dataclass(frozen=True, slots=True)
class Moment:
    """An instant at which a peak can happen, with everything that is alive then."""

    name: str
    """E.g. ``backward of the loss``."""
    phase: Phase
    terms: tuple[Term, ...]
    first_step: bool = False
    """Whether it belongs to the first optimizer step (states are created in it) or to a later one."""

    @property
    def num_bytes(self) -> int:
        return sum(term.num_bytes for term in self.terms)
