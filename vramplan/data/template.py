"""A conversation as the tokenizer's chat template renders it, and which characters of it are the assistant's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from vramplan.data.row import Conversation
from vramplan.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TrainOn = Literal["assistant", "all", "last"]

DEFAULT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
"""Given to a tokenizer that has none (a base model's); it is saved with the trained model."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation's text, and the half-open spans of characters that the assistant wrote."""

    text: str
    spans: tuple[tuple[int, int], ...]


def ensure_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Gives a tokenizer without a chat template the default one; says whether it did."""
    if tokenizer.chat_template is not None:
        return False
    tokenizer.chat_template = DEFAULT_TEMPLATE
    return True


def render(conversation: Conversation, tokenizer: PreTrainedTokenizerBase, train_on: TrainOn = "assistant") -> Rendered:
    """The whole conversation as text. An assistant's span begins where generation begins and ends with the
    end-of-turn marker, if the template writes one: what the model must produce, no more. Under ``last`` only the last
    assistant turn has a span, under ``all`` the whole text is one.

    Raises:
        DataError: the template refuses the conversation, fails on it, or changes a turn that has a span as later ones
            are added.
    """
    messages = conversation.messages
    full = _apply(tokenizer, messages, conversation.where, prompt=False)
    if train_on == "all":
        return Rendered(full, ((0, len(full)),))
    turns = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
    learnt = turns[-1:] if train_on == "last" else turns
    mend = "take a template that writes every turn alike, or" if train_on == "last" else "set data.train_on to last, or"
    return Rendered(full, tuple(_assistant_span(tokenizer, conversation, turn, full, mend) for turn in learnt))


def _assistant_span(
    tokenizer: PreTrainedTokenizerBase, conversation: Conversation, turn: int, full: str, mend: str
) -> tuple[int, int]:
    """``mend``: what to do where the turn cannot be told apart, up to "or"."""
    messages, where = conversation.messages, conversation.where
    before = _apply(tokenizer, messages[:turn], where, prompt=True)
    through = _apply(tokenizer, messages[: turn + 1], where, prompt=False)
    if not through.startswith(before) or not full.startswith(through):
        raise DataError(
            f"{where}: the chat template renders turn {turn + 1} differently when more turns follow, so its "
            f"tokens cannot be told apart; {mend} give rows with one assistant turn at the end"
        )
    return len(before), _end_of_turn(through, len(before), messages[turn]["content"])


def _end_of_turn(text: str, start: int, content: str) -> int:
    """Where the assistant stops: after the marker that follows its words, before the template's own white space."""
    words = content if text.startswith(content, start) else content.strip()
    after = text.find(words, start)
    tail_start = after + len(words) if after >= 0 else start
    return tail_start + len(text[tail_start:].rstrip())


def _apply(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]], where: str, *, prompt: bool) -> str:
    import jinja2

    if not messages:
        return ""
    try:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt)
    except jinja2.TemplateError as error:
        raise DataError(f"{where}: the tokenizer's chat template refuses it ({error})") from error
    except (TypeError, ValueError, LookupError, AttributeError) as error:  # what expressions in it raise
        raise DataError(f"{where}: the tokenizer's chat template fails on it ({error})") from error
    return str(text)
