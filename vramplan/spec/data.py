"""DataSpec: what text the run is trained on, in which shares, and how it becomes sequences."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from vramplan.spec.base import UserModel

Form = Literal["messages", "sharegpt", "alpaca", "completion", "text"]
"""How a row holds its text; see ``SourceSpec.form``."""
FieldName = Literal[
    "messages", "conversations", "instruction", "input", "output", "system", "prompt", "completion", "text"
]


class SourceSpec(UserModel):
    """One source of rows."""

    path: str
    """A file (.jsonl, .ndjson, .json, .csv, .tsv, .parquet, .txt, .md, .rst), a directory of text files, a glob of
    such files, ``hub:OWNER/NAME``, ``builtin:arithmetic``, ``builtin:python-reference`` or ``builtin:tickets``."""
    name: str | None = None
    """What it is called in reports. None: its path."""
    weight: float | None = Field(default=None, gt=0)
    """Its share of the sequences that a run draws, relative to the other sources' weights. None for all: by number of
    sequences."""
    form: Form | None = None
    """``messages`` (role, content), ``sharegpt`` (``conversations`` of from, value), ``alpaca`` (instruction, input,
    output), ``completion`` (prompt, completion) or ``text``. None: recognised by each row's keys."""
    fields: dict[FieldName, str] = Field(default_factory=dict)
    """Columns that have another name: ``{prompt: question, completion: answer}``."""
    weight_column: str | None = None
    """A column with a number at least 0: how much the row's tokens count in the loss. None: 1 each."""
    subset: str | None = None
    """Configuration of a hub data set."""
    split: str = "train"
    """Split of a hub data set."""

    @property
    def label(self) -> str:
        """Its name in reports."""
        return self.name or self.path


class ReplaySpec(SourceSpec):
    """General data mixed in so that the model keeps what it knew."""

    share: float = Field(default=0.1, gt=0, lt=1)
    """Share of every global batch's sequences: never off by a whole sequence at any step, and exact over the run."""
    eval_frac: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of its rows that are not trained on but are the held-out set ``replay``: what training takes away. Of raw
    text as ``data.eval_frac``."""


class HardExamplesSpec(UserModel):
    """From the second epoch on, rows are drawn by the loss they last had."""

    temperature: float = Field(default=1.0, gt=0)
    """Chances follow exp(z / temperature), z being a row's loss in standard deviations above the mean: low values draw
    almost only the hardest."""
    floor: float = Field(default=0.2, ge=0, le=1)
    """Every row keeps at least this part of its equal chance."""
    patience: int = Field(default=2, ge=2)
    """Times a row must have been seen before it can be held for noise."""
    min_improvement: float = Field(default=0.1, ge=0, le=1)
    """A row seen that often whose best loss is not this part below its first never improves."""
    cap: float = Field(default=1.0, ge=0)
    """The most that such a row gets, in units of its equal chance."""


class FimSpec(UserModel):
    """Fill-in-the-middle on raw text (Bavarian et al. 2022, arXiv:2207.14255)."""

    rate: float = Field(default=0.5, ge=0, le=1)
    """Chance that a piece of a document (all of it, where it fits into ``seq_len``) is rearranged; the others stay
    causal."""
    spm_rate: float = Field(default=0.5, ge=0, le=1)
    """Share of these in suffix-prefix-middle order; the others are prefix-suffix-middle."""


class AugmentSpec(UserModel):
    """Changes to what the model is shown; what it must say stays."""

    neftune_alpha: float | None = Field(default=None, gt=0)
    """Uniform noise on embeddings in training, scaled by alpha / sqrt(tokens x width) (arXiv:2310.05914). None: off."""
    token_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Chance that a token is shown as the unknown (or padding) token, special ones aside; targets stay, and it is
    drawn anew at every visit."""
    prompt_templates: tuple[str, ...] = ()
    """Texts with ``{prompt}`` in them; each ``completion`` row's prompt, and each conversation's first user turn, is
    put into one of them, drawn anew at every visit (in a pack by row: packs are laid once). Rows are kept once a
    template; held-out rows have one each."""

    @model_validator(mode="after")
    def _templates_take_the_prompt(self) -> Self:
        for template in self.prompt_templates:
            if template.count("{prompt}") != 1:
                raise ValueError(f"prompt_templates: {template!r} must hold {{prompt}} exactly once")
        return self


SOURCE_SHAPES = {
    "[one]": "a source (a mapping with path)",
    "[several]": "a list of sources",
    "[path]": "a path",
}
"""Tags of the ways in which sources are written, in words."""


def _shape(value: object) -> str:
    """Which way of writing sources a value is, so that an error is about that way and no other."""
    if isinstance(value, dict | SourceSpec):
        return "[one]"
    return "[several]" if isinstance(value, list | tuple) else "[path]"


_Path = Annotated[str, Tag("[path]")]
_One = Annotated[SourceSpec, Tag("[one]")]
_Item = Annotated[SourceSpec, BeforeValidator(lambda value: {"path": value} if isinstance(value, str) else value)]
_Several = Annotated[tuple[_Item, ...], Field(min_length=1), Tag("[several]")]
Source = Annotated[_Path | _One, Discriminator(_shape)]
Sources = Annotated[_Path | _One | _Several, Discriminator(_shape)]


HELD_OUT = "held_out"
"""Name of the first held-out set: ``data.eval``, or ``data.eval_frac`` of what is trained on."""
REPLAY_SET = "replay"
"""Name of the held-out rows of ``data.replay``."""


class DataSpec(UserModel):
    """Where the training text lies and how it becomes tokens."""

    train: Sources = "builtin:arithmetic"
    """A path (see ``path`` below it), a source with its options, or a list of these (with weights). Raw text is cut
    into full sequences; other rows are padded to the longest of their global batch (in the first two steps to
    ``seq_len``, so that memory's peak is met at once)."""
    replay: ReplaySpec | None = None
    """General data mixed into the global batches in a fixed share."""
    eval: Source | None = None
    """The same for evaluation. None: ``eval_frac`` of the training data is held out."""
    eval_frac: float = Field(default=0.05, ge=0.0, lt=1.0)
    """Share of the training rows held out for evaluation when ``eval`` is None. Of raw text: whole documents with about
    this share of its characters (of a single document: sequences cut from it)."""
    eval_sets: dict[str, Source] = Field(default_factory=dict)
    """More held-out sets by name (such as ``general: other.jsonl``), each a path or a source with its options, as in
    ``train``; each is evaluated beside the first."""
    eval_max: int | None = Field(default=None, ge=1)
    """The most sequences of each held-out set that an evaluation takes: the first ones. None: all."""
    train_on: Literal["assistant", "all", "last"] = "assistant"
    """Which tokens of ``messages`` count in the loss: all assistant turns, every token, or the last assistant turn."""
    drop_unlearnable: bool = False
    """Rows of which nothing that is learnt lies within ``seq_len`` tokens (a prompt that fills it) are left out, and
    counted in a note, instead of being an error."""
    packing: Literal["none", "best_fit"] = "none"
    """``best_fit`` lays several rows into one sequence of up to ``seq_len`` tokens (arXiv:2404.10830); positions
    restart and no row attends to another."""
    plan_for: Literal["seq_len", "longest"] = "seq_len"
    """``longest``: ``vramplan plan`` reads the data and plans for the longest sequence that really comes."""
    keep: Literal["memory", "disk"] = "memory"
    """Where tokens live. ``disk``: rows are read as a stream and their tokens lie in a memory-mapped file, for data
    that does not fit into memory."""
    hard_examples: HardExamplesSpec | None = None
    """Draw rows with a high loss more often. None: every row once an epoch."""
    fim: FimSpec | None = None
    """Fill-in-the-middle for raw text. None: causal only."""
    augment: AugmentSpec = AugmentSpec()

    @model_validator(mode="after")
    def _all_weights_or_none(self) -> Self:
        given = [source.weight is not None for source in self.train_sources]
        if any(given) and not all(given):
            raise ValueError("train: give every source a weight, or none")
        return self

    @model_validator(mode="after")
    def _wordings_have_the_same_rows(self) -> Self:
        if self.drop_unlearnable and len(self.augment.prompt_templates) > 1:
            raise ValueError(
                "data.drop_unlearnable and several data.augment.prompt_templates exclude each other: a row could fit "
                "in one wording alone"
            )
        return self

    @model_validator(mode="after")
    def _names_of_eval_sets_are_free(self) -> Self:
        for name in self.eval_sets.keys() & {HELD_OUT, REPLAY_SET}:
            raise ValueError(f"eval_sets: the name {name!r} is taken; call the set otherwise")
        return self

    @property
    def set_names(self) -> tuple[str, ...]:
        """Names of the held-out sets that a run evaluates on."""
        own = (HELD_OUT,) if self.eval is not None or self.eval_frac else ()
        replay = (REPLAY_SET,) if self.replay is not None and self.replay.eval_frac else ()
        return (*own, *replay, *self.eval_sets)

    @property
    def train_sources(self) -> tuple[SourceSpec, ...]:
        """The sources trained on, replay aside."""
        if isinstance(self.train, tuple):
            return self.train
        return (as_source(self.train),)

    @property
    def sources(self) -> tuple[SourceSpec, ...]:
        """Everything that is read."""
        others = (self.replay, None if self.eval is None else as_source(self.eval))
        return (*self.train_sources, *(source for source in others if source is not None))


def as_source(source: str | SourceSpec) -> SourceSpec:
    """A bare path as a source."""
    return SourceSpec(path=source) if isinstance(source, str) else source
