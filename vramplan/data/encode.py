"""Rows -> samples: token ids, and which of them are learnt."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from vramplan.data.fim import Fim, fim_samples
from vramplan.data.row import Completion, Conversation, Row, Text
from vramplan.data.sample import Sample
from vramplan.data.template import Rendered, TrainOn, render
from vramplan.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Encoding:
    """How rows become samples of at most ``seq_len`` tokens."""

    seq_len: int
    train_on: TrainOn = "assistant"
    by_document: bool = False
    """Raw text: every document is a sample of its own (cut where it is longer), instead of all laid end to end."""
    fim: Fim | None = None
    prompt_templates: tuple[str, ...] = ()
    seed: int = 0
    """Decides prompt templates and fill-in-the-middle."""


def encode_rows(
    rows: Iterable[Row], tokenizer: PreTrainedTokenizerBase, seq_len: int, train_on: TrainOn = "assistant"
) -> list[Sample]:
    """As ``iter_samples``, with nothing but the length and the mask chosen."""
    return list(iter_samples(rows, tokenizer, Encoding(seq_len, train_on)))


def iter_samples(
    rows: Iterable[Row], tokenizer: PreTrainedTokenizerBase, encoding: Encoding, dropped: list[str] | None = None
) -> Iterator[Sample]:
    """Samples of at most ``seq_len`` tokens: one a conversation or completion; raw text is cut into full sequences.

    ``dropped``: takes the names of rows of which nothing that is learnt lies within ``seq_len`` tokens; None: such a
    row is an error.

    Raises:
        DataError: a row cannot be rendered, or holds nothing to learn.
    """
    if not tokenizer.is_fast:
        raise DataError("the tokenizer does not say which characters a token stands for; a fast tokenizer is needed")
    iterator = iter(rows)
    first = next(iterator, None)
    if first is None:
        return
    every = chain([first], iterator)
    if isinstance(first, Text):
        yield from _text_samples((row for row in every if isinstance(row, Text)), tokenizer, encoding)
    else:
        for row in every:
            sample, first_learnt = _encode_row(row, tokenizer, encoding)
            if sample.num_targets:
                yield sample
            elif dropped is not None:
                dropped.append(row.where)
            else:
                raise DataError(
                    f"{row.where}: no token to learn lies within seq_len {encoding.seq_len} (the first is token "
                    f"{first_learnt}); raise seq_len, drop the row, or set data.drop_unlearnable"
                )


def _encode_row(row: Row, tokenizer: PreTrainedTokenizerBase, encoding: Encoding) -> tuple[Sample, int]:
    """(the sample, which token of the whole row is the first that is learnt, counted from 1)."""
    seq_len, template = encoding.seq_len, _template_of(row, encoding)
    if isinstance(row, Conversation):
        rendered = render(_with_first_prompt(row, template), tokenizer, encoding.train_on)
        ids, trained = _encode_spans(rendered, tokenizer, special=False)
    elif isinstance(row, Completion):
        prompt = template.replace("{prompt}", row.prompt)
        ids, trained = _with_end(*_encode_completion(prompt, row.completion, tokenizer), tokenizer)
    else:
        raise TypeError(f"{type(row).__name__} is encoded by blocks")
    if encoding.train_on == "all":
        trained = np.ones_like(trained)
    sample = Sample(row.where, ids[:seq_len], trained[:seq_len], max(0, len(ids) - seq_len), row.weight)
    return sample, int(np.argmax(trained)) + 1 if trained.any() else len(ids)


def _template_of(row: Row, encoding: Encoding) -> str:
    templates = encoding.prompt_templates
    return templates[draw(encoding.seed, row.where) % len(templates)] if templates else "{prompt}"


def _with_first_prompt(row: Conversation, template: str) -> Conversation:
    """The conversation with its first user turn put into the template."""
    turns = list(row.messages)
    for number, message in enumerate(turns):
        if message["role"] == "user":
            turns[number] = {**message, "content": template.replace("{prompt}", message["content"])}
            break
    return Conversation(row.where, tuple(turns), row.weight)


def draw(seed: int, *parts: object) -> int:
    """63 random bits that depend on nothing else, equal on every machine."""
    digest = hashlib.blake2b(repr((seed, *parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


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


def _encode_completion(
    prompt: str, completion: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """The tokens of both, those of the completion learnt.

    A token that begins in the prompt and ends in the completion (a blank and a word) would be neither. Then each is
    encoded by itself, as the prompt is when the model is used; if the tokenizer cannot do that without changing the
    text (it puts a blank first), the token is learnt.
    """
    text, edge = prompt + completion, len(prompt)
    encoded = tokenizer(text, add_special_tokens=True, return_offsets_mapping=True)
    ids = np.asarray(encoded["input_ids"], dtype=np.int64)
    offsets = np.asarray(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)
    crosses = (offsets[:, 0] < edge) & (offsets[:, 1] > edge)
    if crosses.any():
        first = list(tokenizer(prompt, add_special_tokens=True)["input_ids"])
        if first and first[-1] == tokenizer.eos_token_id:
            first.pop()
        second = list(tokenizer(completion, add_special_tokens=False)["input_ids"])
        if tokenizer.decode(second) == completion:
            return np.asarray(first + second, dtype=np.int64), np.arange(len(first) + len(second)) >= len(first)
    return ids, crosses | ((offsets[:, 0] >= edge) & (offsets[:, 1] > offsets[:, 0]))


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


def _text_samples(rows: Iterator[Text], tokenizer: PreTrainedTokenizerBase, encoding: Encoding) -> Iterator[Sample]:
    if encoding.fim is not None:
        for row in rows:
            yield from fim_samples(
                row, tokenizer, encoding.seq_len, encoding.fim, draw(encoding.seed, "fim", row.where)
            )
    elif encoding.by_document:
        for row in rows:
            yield from _blocks(iter([row]), tokenizer, encoding.seq_len)
    else:
        yield from _blocks(rows, tokenizer, encoding.seq_len)


def _blocks(rows: Iterator[Text], tokenizer: PreTrainedTokenizerBase, seq_len: int) -> Iterator[Sample]:
    """Documents, each closed by the end-of-sequence token, laid end to end and cut into sequences of ``seq_len``;
    a sequence is named after, and weighs as, the document that it begins in."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    waiting: list[int] = []
    origin: list[Text] = []
    for row in rows:
        tokens = tokenizer(row.text, add_special_tokens=False)["input_ids"] + end
        waiting += tokens
        origin += [row] * len(tokens)
        full = len(waiting) - len(waiting) % seq_len
        for start in range(0, full, seq_len):
            yield _block(origin[start], waiting[start : start + seq_len])
        del waiting[:full], origin[:full]
    if len(waiting) > 1:  # a single token predicts nothing
        yield _block(origin[0], waiting)


def _block(row: Text, ids: list[int]) -> Sample:
    return Sample(row.where, np.asarray(ids, dtype=np.int64), np.ones(len(ids), dtype=np.bool_), weight=row.weight)
