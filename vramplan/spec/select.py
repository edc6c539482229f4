"""SelectSpec: which documents of a general pool are kept for continued pre-training."""

from __future__ import annotations

from pydantic import Field

from vramplan.spec.base import UserModel


class SelectSpec(UserModel):
    """A pool of raw text, filtered, without duplicates, and chosen by likeness to a target."""

    pool: str
    """Raw text to choose from: a path or name as ``data.train`` takes it."""
    target: str | None = None
    """Raw text that the chosen should resemble. None: everything that passes the filters is kept."""
    count: int | None = Field(default=None, ge=1)
    """Documents to choose. None: a tenth of those that pass the filters (all without a target)."""
    seed: int = 0
    """Decides the draw and the hash functions."""
    min_chars: int = Field(default=200, ge=0)
    """Shorter documents are dropped."""
    max_chars: int = Field(default=1_000_000, ge=1)
    """Longer documents are dropped."""
    min_word_frac: float = Field(default=0.6, ge=0, le=1)
    """Least share of letters, digits, marks and blanks of any script among the characters."""
    max_repeated_line_frac: float = Field(default=0.2, ge=0, le=1)
    """Most characters in lines that stand elsewhere in the document too (Rae et al. 2021, arXiv:2112.11446)."""
    min_compressed_frac: float = Field(default=0.15, ge=0, le=1)
    """Least size after zlib as a share of the size before: below it a text repeats itself."""
    near_duplicate: float = Field(default=0.8, gt=0, le=1)
    """Jaccard similarity of five-word runs from which two documents count as the same (MinHash, estimated); 1 looks
    for exact duplicates only."""
