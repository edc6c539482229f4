"""Every error that vramplan raises on purpose.

::

    VramplanError                  exit code 2; its text is one clear sentence for the user
      UnknownNameError             a model, GPU, family or key that is not known (names the nearest)
      AmbiguousNameError           a name that means several things (names them)
      SpecError                    a value of the user's spec that cannot be (names the field)
        LegalityError              a combination that DeepSpeed refuses (gives its reason)
        NoPlanError                no layout can make it (says which number to change)
      ConfigError                  a model's config.json that lacks or contradicts a field
      DataError                    a row or file of the data that is malformed (file, line, what)
      CheckpointError              a checkpoint that cannot be read or written
        NoWholeCheckpointError     all that there are to go on from are damaged
      RunFailedError               a training process that ended without finishing (its cause)
      SimulationError              the real engine could not be traced (names the module)

Anything else that escapes is a bug in vramplan.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class VramplanError(Exception):
    """Base of every error that a user can cause or mend; its text is one sentence."""

    exit_code: int = 2


class UnknownNameError(VramplanError):
    """A name that no catalogue or schema holds; the text lists the nearest known ones."""

    def __init__(self, kind: str, name: str, known: Iterable[str], hint: str = "") -> None:
        self.kind = kind
        self.name = name
        self.nearest = nearest_names(name, known)
        near = f"; did you mean {' or '.join(self.nearest)}?" if self.nearest else ""
        super().__init__(f"unknown {kind} {name!r}{near}{' ' + hint if hint else ''}")


class AmbiguousNameError(VramplanError):
    """A name that could mean several known ones; the text lists them."""

    def __init__(self, kind: str, name: str, candidates: Iterable[str], hint: str = "") -> None:
        self.kind = kind
        self.name = name
        self.candidates = tuple(candidates)
        listed = ", ".join(self.candidates)
        super().__init__(f"{kind} {name!r} could mean any of: {listed}{'; ' + hint if hint else ''}")


class SpecError(VramplanError):
    """A value in the user's spec that cannot be; the text names the field and what to change."""


class LegalityError(SpecError):
    """A combination that DeepSpeed (or torch) refuses; the text gives its reason."""


class NoPlanError(SpecError):
    """No layout meets the request; the text says which number to change."""


class ConfigError(VramplanError):
    """A model's ``config.json`` lacks a field or contradicts itself."""


class DataError(VramplanError):
    """A row, file or column of the training data is malformed."""


class CheckpointError(VramplanError):
    """A checkpoint cannot be read or written."""


class NoWholeCheckpointError(CheckpointError):
    """There are checkpoints to go on from, and every one of them is damaged."""


class RunFailedError(VramplanError):
    """A training process ended without finishing; the text says why."""

    exit_code = 3


class SimulationError(VramplanError):
    """The real engine could not be traced on fake tensors; the text names the module."""


def nearest_names(name: str, known: Iterable[str], count: int = 3) -> tuple[str, ...]:
    """The known names most like ``name``, best first, without case: those that hold it, then those spelt alike.

    A hub id is often given without its owner, or the reverse, so the part after the slash is compared too.
    """
    by_lower = {candidate.lower(): candidate for candidate in known}
    wanted = name.lower()
    tail = wanted.split("/")[-1]
    tails = {full.split("/")[-1]: full for full in by_lower}
    holding = sorted((full for full in by_lower if tail and tail in full), key=len)
    alike = difflib.get_close_matches(wanted, list(by_lower), n=count, cutoff=0.45)
    alike_tails = [tails[match] for match in difflib.get_close_matches(tail, list(tails), n=count, cutoff=0.55)]
    best = dict.fromkeys([*holding, *alike, *alike_tails])
    return tuple(by_lower[match] for match in list(best)[:count])
