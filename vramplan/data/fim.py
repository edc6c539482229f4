"""Fill-in-the-middle: documents rearranged so that a causal model learns to fill gaps (Bavarian et al. 2022,
arXiv:2207.14255).

A piece of text is cut at two random characters into prefix, middle and suffix, and written as
``PRE prefix SUF suffix MID middle`` (PSM) or ``PRE SUF suffix MID prefix middle`` (SPM, the paper's appendix D, which
keeps prefix and middle in one stretch). Every token is learnt, the markers too, as in the paper.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from vramplan.data.row import Text
from vramplan.data.sample import Sample
from vramplan.errors import DataError
from vramplan.spec.data import FimSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARKERS = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen2.5-Coder, CodeGemma
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder 1 and 2
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),  # SantaCoder
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # DeepSeek-Coder: PRE, SUF, MID
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),  # Code Llama
)
"""Names of the tokens PRE, SUF and MID in public tokenizers."""
_NUM_MARKERS = 3
Order = Literal["causal", "psm", "spm"]


@dataclass(frozen=True, slots=True)
class Fim:
    """How often, and the ids of the three markers."""

    rate: float
    spm_rate: float
    prefix_id: int
    suffix_id: int
    middle_id: int


def fim_of(spec: FimSpec, tokenizer: PreTrainedTokenizerBase) -> Fim:
    """The markers of a tokenizer.

    Raises:
        DataError: it has none.
    """
    vocabulary = tokenizer.get_vocab()
    for names in MARKERS:
        if all(name in vocabulary for name in names):
            prefix, suffix, middle = (vocabulary[name] for name in names)
            return Fim(spec.rate, spec.spm_rate, prefix, suffix, middle)
    raise DataError(
        "data.fim: the tokenizer has no fill-in-the-middle tokens (such as <|fim_prefix|>); choose a model that has "
        "them, or leave data.fim out"
    )


def fim_samples(row: Text, tokenizer: PreTrainedTokenizerBase, seq_len: int, fim: Fim, seed: int) -> Iterator[Sample]:
    """The document in pieces that fit into ``seq_len`` tokens, ``fim.rate`` of them rearranged. Cuts are between
    characters, before tokens are made, so that the model meets words cut anywhere (the paper's section 3.1).

    Raises:
        DataError: ``seq_len`` has no room for the markers and one token's text.
    """
    random = np.random.RandomState(np.random.MT19937(np.random.SeedSequence(seed)))
    if seq_len <= _NUM_MARKERS + 1:
        raise DataError("data.fim: seq_len leaves no room for text beside the markers; raise it")
    edges, first = _edges(row.text, tokenizer), 0
    while edges[first] < len(row.text):
        chosen, is_spm = random.random_sample(2) < (fim.rate, fim.spm_rate)
        order: Order = "causal" if not chosen else "spm" if is_spm else "psm"
        ids, first = _longest_piece(row, edges, first, tokenizer, fim, seq_len, order, random.random_sample(2))
        if len(ids) > 1:  # one token, the last of a document without an end, predicts nothing
            yield Sample(row.where, np.asarray(ids, dtype=np.int64), np.ones(len(ids), dtype=np.bool_), 0, row.weight)


def _edges(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Where the text's tokens begin, in characters (the first at 0), and its end; tokens of one character share it."""
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
    return [0, *(start for start, _ in found[1:]), len(text)]


def _longest_piece(
    row: Text,
    edges: list[int],
    first: int,
    tokenizer: PreTrainedTokenizerBase,
    fim: Fim,
    seq_len: int,
    order: Order,
    places: NDArray[np.float64],
) -> tuple[list[int], int]:
    """(ids of the piece from edge ``first`` on, the edge where the next one begins). ``places``: where it is cut, as
    shares of its length. Cut words make more tokens than whole ones: the piece is shortened by what is too much, and
    the next one begins there.

    Raises:
        DataError: one token's text alone is too long.
    """
    room = seq_len if order == "causal" else seq_len - _NUM_MARKERS
    wanted = min(first + room, len(edges) - 1)
    while True:
        last = _edge_after(edges, first, wanted)
        text = row.text[edges[first] : edges[last]]
        cuts = sorted(int(place * (len(text) + 1)) for place in places)
        ids = _ids(text, tokenizer) if order == "causal" else _rearranged(text, cuts, tokenizer, fim, order)
        if edges[last] == len(row.text) and tokenizer.eos_token_id is not None:
            ids.append(tokenizer.eos_token_id)
        if len(ids) <= seq_len:
            return ids, last
        if _edge_after(edges, first, first + 1) < last:
            wanted = max(first + 1, last - (len(ids) - seq_len))
        elif order != "causal":  # a single character or token whose parts are too many: it stays whole
            return _longest_piece(row, edges, first, tokenizer, fim, seq_len, "causal", places)
        else:
            raise DataError(f"{row.where}: data.fim: {text!r} has no room in seq_len {seq_len}; raise it")


def _edge_after(edges: list[int], first: int, wanted: int) -> int:
    """The first of the edges at the place of edge ``wanted``; where that is the place of ``first``, the next one."""
    if edges[wanted] > edges[first]:
        return bisect_left(edges, edges[wanted])
    return bisect_right(edges, edges[first])


def _rearranged(text: str, cuts: list[int], tokenizer: PreTrainedTokenizerBase, fim: Fim, order: Order) -> list[int]:
    prefix, middle, suffix = text[: cuts[0]], text[cuts[0] : cuts[1]], text[cuts[1] :]
    after = [fim.suffix_id, *_ids(suffix, tokenizer), fim.middle_id]
    if order == "spm":
        return [fim.prefix_id, *after, *_ids(prefix, tokenizer), *_ids(middle, tokenizer)]
    return [fim.prefix_id, *_ids(prefix, tokenizer), *after, *_ids(middle, tokenizer)]


def _ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []
