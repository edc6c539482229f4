"""DataSpec: what text the run is trained on."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from vramplan.spec.base import UserModel


class DataSpec(UserModel):
    """Where the training text lies and how it becomes tokens."""

    train: str = "builtin:arithmetic"
    """A JSONL file (``messages``, ``prompt``/``completion`` or ``text`` rows), a text file (.txt, .md, .rst), or one of
    ``builtin:arithmetic`` (questions that the calculator answers) and ``builtin:python-reference``. Raw text is cut
    into full sequences; other rows are padded to the longest of their global batch (in the first two steps to
    ``seq_len``, so that memory's peak is met at once)."""
    eval: str | None = None
    """The same for evaluation. None: ``eval_frac`` of the training data is held out."""
    eval_frac: float = Field(default=0.05, ge=0.0, lt=1.0)
    """Share of the training rows held out for evaluation when ``eval`` is None."""
    eval_sets: dict[str, str] = Field(default_factory=dict)
    """More held-out sets by name (such as ``general: other.jsonl``), each evaluated beside the first."""
    train_on: Literal["assistant", "all"] = "assistant"
    """Which tokens of ``messages`` count in the loss."""
