"""Rows -> samples: token ids, and which of them are learnt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from vramplan.data.row import Completion, Conversation, Row, Text
from vramplan.data.template import Rendered, render
from vramplan.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TrainOn = Literal["assistant", "all"]


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

    @property
    def num_tokens(self) -> int:
        return len(self.ids)

    @property
    def num_targets(self) -> int:
        """Tokens in the loss: the first of a sequence is never predicted."""
        return int(self.trained[1:].sum())


def encode_rows(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, seq_len: int, train_on: TrainOn = "assistant"
) -> list[Sample]:
    """Samples of at most ``seq_len`` tokens: one a conversation or completion; raw text is cut into full sequences.

    Raises:
        DataError: a row cannot be rendered, or nothing of it that is learnt lies within ``seq_len`` tokens.
    """
    if not tokenizer.is_fast:
        raise DataError("the tokenizer does not say which characters a token stands for; a fast tokenizer is needed")
    if isinstance(rows[0], Text):
        return list(_text_samples([row for row in rows if isinstance(row, Text)], tokenizer, seq_len))
    return [_encode_row(row, tokenizer, seq_len, train_on) for row in rows]


def _encode_row(row: Row, tokenizer: PreTrainedTokenizerBase, seq_len: int, train_on: TrainOn) -> Sample:
    if isinstance(row, Conversation):
        ids, trained = _encode_spans(render(row, tokenizer), tokenizer, special=False)
    elif isinstance(row, Completion):
        text = row.prompt + row.completion
        rendered = Rendered(text, ((len(row.prompt), len(text)),))
        ids, trained = _with_end(*_encode_spans(rendered, tokenizer, special=True), tokenizer)
    else:
        raise TypeError(f"{type(row).__name__} is encoded by blocks")
    if train_on == "all":
        trained = np.ones_like(trained)
    sample = Sample(row.where, ids[:seq_len], trained[:seq_len], max(0, len(ids) - seq_len))
    if not sample.num_targets:
        needed = int(np.argmax(trained)) + 1 if trained.any() else len(ids)
        raise DataError(
            f"{row.where}: no token to learn lies within seq_len {seq_len} (the first is token {needed}); "
            f"raise seq_len or drop the row"
        )
    return sample


def _encode_spans(
    rendered: Rendered, tokenizer: PreTrainedTokenizerBase, *, special: bool
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Tokens of the text; learnt are those that lie wholly inside a span and stand for at least one character."""
    encoded = tokenizer(rendered.text, add_special_tokens=special, return_offsets_mapping=True)
    ids = np.asarray(encoded["input_ids"], dtype=np.int64)
    offsets = np.asarray(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)
    trained = np.zeros(len(ids), dtype=np.bool_)
    for start, end in rendered.spans:
        trained |= (offsets[:, 0] >= start) & (offsets[:, 1] <= end) & (offsets[:, 1] > offsets[:, 0])
    return ids, trained


def _with_end(
    ids: NDArray[np.int64], trained: NDArray[np.bool_], tokenizer: PreTrainedTokenizerBase
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """A completion ends with the end-of-sequence token, which is learnt."""
    end = tokenizer.eos_token_id
    if end is None:
        return ids, trained
    if len(ids) and ids[-1] == end:
        return ids, np.append(trained[:-1], True)
    return np.append(ids, end), np.append(trained, True)


def _text_samples(rows: Sequence[Text], tokenizer: PreTrainedTokenizerBase, seq_len: int) -> Iterator[Sample]:
    """Documents, each closed by the end-of-sequence token, laid end to end and cut into sequences of ``seq_len``."""
    ids, where = _joined(rows, tokenizer)
    for start in range(0, len(ids), seq_len):
        block = ids[start : start + seq_len]
        if len(block) > 1:  # a single token predicts nothing
            yield Sample(where[start], block, np.ones(len(block), dtype=np.bool_))


def _joined(rows: Sequence[Text], tokenizer: PreTrainedTokenizerBase) -> tuple[NDArray[np.int64], list[str]]:
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids: list[int] = []
    where: list[str] = []
    for row in rows:
        tokens = tokenizer(row.text, add_special_tokens=False)["input_ids"] + end
        ids += tokens
        where += [row.where] * len(tokens)
    return np.asarray(ids, dtype=np.int64), where
