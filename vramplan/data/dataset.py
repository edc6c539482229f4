"""The samples of a run: what is trained on, what is held out, and what reading them found."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from vramplan.data.augment import TokenDropout, token_dropout
from vramplan.data.encode import Encoding, draw, iter_samples
from vramplan.data.fim import fim_of
from vramplan.data.hard import Mining
from vramplan.data.holdout import documents, held_out_documents, split
from vramplan.data.lengths import Lengths, measure_lengths
from vramplan.data.mixture import Part, Stream, counts_text, make_parts
from vramplan.data.packing import pack
from vramplan.data.row import Conversation, Row, Text
from vramplan.data.sample import Sample
from vramplan.data.store import Joined, keep_samples
from vramplan.data.tables import iter_rows
from vramplan.data.template import ensure_template
from vramplan.errors import DataError
from vramplan.spec.data import DataSpec, SourceSpec, as_source
from vramplan.spec.run import RunSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class RunData:
    """Samples to train on and to evaluate on; ``notes``: sentences that the user should read."""

    train: Sequence[Sample]
    held_out: Sequence[Sample]
    stream: Stream
    lengths: Lengths
    is_weighted: bool = False
    """Whether a source has weights of its rows."""
    dropout: TokenDropout | None = None
    notes: tuple[str, ...] = ()
    held_out_replay: Sequence[Sample] = ()
    """General samples that are not trained on: ``data.replay.eval_frac`` of them."""
    worded: tuple[Sequence[Sample], ...] = ()
    """``train`` under each of several prompt templates, one of which a visit is shown; none where rows are packed."""
    forms: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """By source, the forms that its rows were seen to have, or were said to have."""

    def shown(self, step: int, index: int) -> Sample:
        """Training sample ``index`` as step ``step`` shows it to the model."""
        sample = self.train[index]
        if self.worded:
            sample = self.worded[draw(self.stream.seed, "template", step, index) % len(self.worded)][index]
        return sample if self.dropout is None else self.dropout.apply(sample, step, index)


def load_data(run: RunSpec, tokenizer: PreTrainedTokenizerBase) -> RunData:
    """Reads and encodes what a run is trained and evaluated on.

    Raises:
        DataError: a row is malformed, or the held-out part takes every row.
    """
    _check_packing(run)
    spec, seed = run.data, run.training.seed
    reader = Reader(run, tokenizer)
    units, held_out, general = _read(reader)
    worded = tuple(_one(_read(Reader(run, tokenizer, template))[0]) for template in _varied_templates(spec))
    mining = None if spec.hard_examples is None else Mining(spec.hard_examples, seed)
    stream = Stream(_parts(spec, [len(samples) for samples in units]), seed, mining)
    lengths = measure_lengths(units, _one([held_out, *worded]), run.seq_len)
    dropout = token_dropout(spec.augment.token_dropout, tokenizer, seed)
    notes = (*reader.notes, *reader.without_effect(), *lengths.notes(), *_mixture_note(stream))
    weighted = _is_weighted(spec)
    return RunData(_one(units), held_out, stream, lengths, weighted, dropout, notes, general, worded, reader.forms)


def _read(reader: Reader) -> tuple[list[Sequence[Sample]], Sequence[Sample], Sequence[Sample]]:
    """(what is trained on, source by source with replay last; held-out samples; held-out general samples)."""
    spec = reader.run.data
    if spec.eval is not None:
        train = [reader.samples(source) for source in spec.train_sources]
        held_out = reader.samples(as_source(spec.eval))
    else:
        parts = [reader.split(source, spec.eval_frac) for source in spec.train_sources]
        train, held_out = [kept for kept, _ in parts], _one([held for _, held in parts])
    replay, general = _replay(spec, reader)
    return [reader.packed(samples) for samples in (*train, *replay)], held_out, general


def _varied_templates(spec: DataSpec) -> tuple[str, ...]:
    """Templates that visits choose among; none where there is no choice, or packs are laid once for all."""
    templates = spec.augment.prompt_templates
    return templates if len(templates) > 1 and spec.packing == "none" else ()


def _replay(spec: DataSpec, reader: Reader) -> tuple[list[Sequence[Sample]], Sequence[Sample]]:
    """(general samples to mix in: none or one sequence of them, those held out)."""
    if spec.replay is None:
        return [], ()
    train, held_out = reader.split(spec.replay, spec.replay.eval_frac, "data.replay.eval_frac")
    return [train], held_out


def _check_packing(run: RunSpec) -> None:
    """transformers 5.17 keeps packed documents apart only where no mask is given (masking_utils.py,
    ``_preprocess_mask_arguments``), and under flash attention only in batches of one sequence
    (modeling_flash_attention_utils.py, ``_is_packed_sequence``)."""
    if run.data.packing == "none":
        return
    if run.attention_mask:
        raise DataError("data.packing and attention_mask: true exclude each other: set attention_mask to false")
    if run.attention == "flash_attention_2" and (run.micro_batch_size or 1) > 1:
        raise DataError("data.packing under flash_attention_2 needs micro_batch_size 1, or attention: sdpa")


def read_samples(
    source: str | SourceSpec, run: RunSpec, tokenizer: PreTrainedTokenizerBase, notes: list[str] | None = None
) -> list[Sample]:
    """One more set, such as a named held-out one, read and masked as the run's own data, unpacked. ``notes`` takes what
    the user should read of it.

    Raises:
        DataError: as ``load_data``.
    """
    reader = Reader(run, tokenizer)
    samples = list(reader.samples(as_source(source)))
    if notes is not None:
        notes += (f"{as_source(source).path}: {text}" for text in reader.notes)
    return samples


def with_eval_sets(
    data: RunData, run: RunSpec, tokenizer: PreTrainedTokenizerBase
) -> tuple[RunData, dict[str, list[Sample]]]:
    """``data`` with the notes on the run's named held-out sets, and these.

    Raises:
        DataError: as ``load_data``.
    """
    notes: list[str] = []
    found = {name: read_samples(source, run, tokenizer, notes) for name, source in run.data.eval_sets.items()}
    return replace(data, notes=(*data.notes, *notes)), found


class Reader:
    """Reads sources with one tokenizer and gathers what the user should know of them."""

    def __init__(self, run: RunSpec, tokenizer: PreTrainedTokenizerBase, template: str | None = None) -> None:
        """``template``: for every prompt, instead of each row's own of ``prompt_templates``."""
        self.run, self.tokenizer = run, tokenizer
        self._notes: dict[str, None] = {}
        self._kinds: set[type[Row]] = set()
        self._forms: dict[str, dict[str, None]] = {}
        self._encoding = encoding_of(run, tokenizer)
        if template is not None:
            self._encoding = replace(self._encoding, prompt_templates=(template,))

    @property
    def notes(self) -> tuple[str, ...]:
        return tuple(self._notes)

    @property
    def forms(self) -> dict[str, tuple[str, ...]]:
        """By source, the forms of the rows that were read of it, in the order in which they came."""
        return {label: tuple(forms) for label, forms in self._forms.items()}

    def without_effect(self) -> list[str]:
        """What is asked for and changes nothing, for no row that was read is of the kind that it is for."""
        spec, found = self.run.data, []
        if spec.fim is not None and Text not in self._kinds:
            found.append("data.fim changes nothing: no source holds raw text")
        if spec.augment.prompt_templates and self._kinds == {Text}:
            found.append("data.augment.prompt_templates changes nothing: raw text has no prompts")
        return found

    def samples(
        self, source: SourceSpec, some: Iterable[Row] | None = None, *, trained: bool = True
    ) -> Sequence[Sample]:
        """The source's samples, in memory or on disk. ``some``: those of its rows that are meant, where not all are;
        ``trained``: whether a row's weight must count."""
        rows = self._with_template(some or iter_rows(source), self._forms.setdefault(source.label, {}))
        dropped: list[str] | None = [] if self.run.data.drop_unlearnable else None
        samples = keep_samples(iter_samples(rows, self.tokenizer, self._encoding, dropped), self.run.data.keep)
        if not len(samples):
            why = f"within seq_len {self.run.seq_len}; raise it" if dropped else "(its text is a single token)"
            raise DataError(f"{source.path}: holds nothing to learn {why}")
        if trained and source.weight_column is not None and not any(sample.weight for sample in samples):
            raise DataError(f"{source.path}: holds nothing to learn (every row's {source.weight_column!r} is 0)")
        self._note_dropped(dropped or [], len(samples))
        self._note_cuts(samples)
        return samples

    def split(
        self, source: SourceSpec, eval_frac: float, key: str = "data.eval_frac"
    ) -> tuple[Sequence[Sample], Sequence[Sample]]:
        """(training, held-out) samples of the source: ``eval_frac`` (``key`` in errors), at least one, drawn by the
        seed. Of raw text whole documents are held out, unless there is but one.

        Raises:
            DataError: nothing would be left to train on.
        """
        seed = self.run.training.seed
        texts = list(documents(source)) if eval_frac and self.run.data.keep == "memory" else None
        sizes = [len(row.text) for row in (documents(source) if texts is None else texts)] if eval_frac else []
        if len(sizes) < 2:
            if sizes:
                self._notes[
                    f"{source.path} is one document: sequences of it are held out, though the text around them is "
                    "trained on, so new text is harder than evaluations on these say"
                ] = None
            return split(self.samples(source), eval_frac, seed, key)
        chosen = held_out_documents(sizes, eval_frac, seed, key)
        held_frac = sum(sizes[number] for number in chosen) / sum(sizes)
        if not eval_frac / 2 <= held_frac <= eval_frac * 2:
            self._notes[
                f"{source.path}: {len(chosen)} of {len(sizes)} documents, {held_frac:.1%} of its text, are held out, "
                f"for documents stay whole ({key} asks for {eval_frac:.1%})"
            ] = None

        def part(of_chosen: bool) -> Iterator[Row]:
            rows = documents(source) if texts is None else iter(texts)
            return (row for number, row in enumerate(rows) if (number in chosen) is of_chosen)

        return self.samples(source, part(False)), self.samples(source, part(True), trained=False)

    def packed(self, samples: Sequence[Sample]) -> Sequence[Sample]:
        """The sequences of the samples: packs of them where packing is on."""
        return samples if self.run.data.packing == "none" else pack(samples, self.run.seq_len)

    def _with_template(self, rows: Iterable[Row], forms: dict[str, None]) -> Iterator[Row]:
        for row in rows:
            self._kinds.add(type(row))
            forms[row.form] = None
            if isinstance(row, Conversation) and ensure_template(self.tokenizer):
                self._notes[
                    "the tokenizer has no chat template: turns are written as <|role|>, content, end of sequence"
                ] = None
            yield row

    def _note_dropped(self, dropped: list[str], num_kept: int) -> None:
        if dropped:
            self._notes[
                f"{len(dropped)} of {len(dropped) + num_kept} rows were left out, for nothing of them that is learnt "
                f"lies within seq_len {self.run.seq_len} ({dropped[0]}{' and others' if dropped[1:] else ''})"
            ] = None

    def _note_cuts(self, samples: Sequence[Sample]) -> None:
        cut = [sample.num_tokens + sample.num_cut for sample in samples if sample.num_cut]
        if cut:
            self._notes[
                f"{len(cut)} of {len(samples)} rows were cut to seq_len {self.run.seq_len}; "
                f"the longest has {max(cut)} tokens"
            ] = None


def encoding_of(run: RunSpec, tokenizer: PreTrainedTokenizerBase) -> Encoding:
    """How this run's rows become samples."""
    spec = run.data
    return Encoding(
        run.seq_len,
        spec.train_on,
        by_document=spec.packing != "none" or _is_weighted(spec),
        fim=None if spec.fim is None else fim_of(spec.fim, tokenizer),
        prompt_templates=spec.augment.prompt_templates,
        seed=run.training.seed,
    )


def _one(sequences: Sequence[Sequence[Sample]]) -> Sequence[Sample]:
    return sequences[0] if len(sequences) == 1 else Joined(sequences)


def _is_weighted(spec: DataSpec) -> bool:
    return any(source.weight_column is not None for source in spec.sources)


def _parts(spec: DataSpec, sizes: list[int]) -> tuple[Part, ...]:
    sources, num_sources = spec.train_sources, len(spec.train_sources)
    weights = [source.weight for source in sources if source.weight is not None]
    replay = None if spec.replay is None else (spec.replay.label, sizes[-1], spec.replay.share)
    return make_parts([source.label for source in sources], sizes[:num_sources], weights or None, replay)


def _mixture_note(stream: Stream) -> list[str]:
    return [f"mixture: {counts_text(stream.parts)}"] if len(stream.parts) > 1 else []
