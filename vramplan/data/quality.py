"""Filters that know no language: each says why a document is dropped, or nothing."""

from __future__ import annotations

import unicodedata
import zlib
from collections import Counter

from vramplan.spec.select import SelectSpec

_WORD_CATEGORIES = frozenset("LNMZ")
"""Unicode's letters, numbers, marks (of Indic scripts and others) and separators."""


FILTERS = {
    "too short": "min_chars",
    "too long": "max_chars",
    "few letters": "min_word_frac",
    "repeated lines": "max_repeated_line_frac",
    "repeats itself": "min_compressed_frac",
}
"""What ``fault_of`` says, and the key that is to be changed if that is too strict."""


def fault_of(text: str, spec: SelectSpec) -> str | None:
    """The first filter that the document does not pass; None if it passes all."""
    if len(text) < spec.min_chars:
        return "too short"
    if len(text) > spec.max_chars:
        return "too long"
    if word_frac(text) < spec.min_word_frac:
        return "few letters"
    if repeated_line_frac(text) > spec.max_repeated_line_frac:
        return "repeated lines"
    if compressed_frac(text) < spec.min_compressed_frac:
        return "repeats itself"
    return None


def word_frac(text: str) -> float:
    """Share of letters, digits, marks and white space among the characters."""
    wordlike = sum(char.isspace() or unicodedata.category(char)[0] in _WORD_CATEGORIES for char in text)
    return wordlike / max(1, len(text))


def repeated_line_frac(text: str) -> float:
    """Share of the characters in lines that occurred before."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    repeated = sum(len(line) * (count - 1) for line, count in Counter(lines).items())
    return repeated / max(1, sum(map(len, lines)))


def compressed_frac(text: str) -> float:
    """Size after zlib as a share of the size before."""
    raw = text.encode("utf-8", errors="replace")
    return len(zlib.compress(raw)) / max(1, len(raw))
