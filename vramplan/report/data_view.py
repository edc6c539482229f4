"""What a run is trained on, for the terminal: sources, lengths, and examples with the trained tokens coloured."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from vramplan.report.console import BAR_WIDTH, bar_text

TRAINED_STYLE = "bold green"
_MARKS = ("⟦", "⟧")
"""Around trained text, so that it is known without colours too."""


def render_data(found: dict[str, Any]) -> RenderableType:
    """``found``: what ``vramplan.data.view.describe_data`` gave."""
    return Group(
        _sources(found),
        "",
        _lengths(found),
        *(Text(f"note: {note}", style="yellow") for note in found["notes"]),
        *_examples(found),
    )


def render_selection(found: dict[str, Any]) -> RenderableType:
    """``found``: what ``vramplan.data.select.select`` gave."""
    table = Table(box=None, pad_edge=False)
    table.add_column("documents")
    table.add_column("", justify="right")
    table.add_column("such as", overflow="fold")
    table.add_row("in the pool", f"{found['num_pool']:,}", found["pool"])
    for reason, count in found["dropped"].items():
        table.add_row(f"dropped: {reason}", f"{count:,}", ", ".join(found["examples"][reason]))
    table.add_row("chosen", f"{found['num_chosen']:,}", found["output"], style="bold")
    likeness = found["mean_log_importance"]
    if likeness is None:
        return table
    said = f"mean log-importance: {likeness['chosen']:,.1f} of the chosen, {likeness['pool']:,.1f} of what passed"
    return Group(table, Text(said))


def _sources(found: dict[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("source", overflow="fold")
    table.add_column("form of its rows")
    table.add_column("sequences", justify="right")
    table.add_column("share of all drawn", justify="right")
    for part in found["parts"]:
        name = f"{part['name']} (replay)" if part["is_replay"] else part["name"]
        table.add_row(name, ", ".join(part["forms"]), f"{part['num_sequences']:,}", f"{part['share']:.1%}")
    table.add_row("held out", "", f"{found['num_held_out']:,}", "")
    if found["num_held_out_replay"]:
        table.add_row("replay, held out", "", f"{found['num_held_out_replay']:,}", "")
    for name, size in found["eval_sets"].items():
        table.add_row(f"{name} (eval set)", "", f"{size:,}", "")
    return table


def _lengths(found: dict[str, Any]) -> RenderableType:
    lengths = found["lengths"]
    table = Table(box=None, pad_edge=False)
    table.add_column("tokens", justify="right")
    table.add_column("sequences", justify="right")
    table.add_column("", no_wrap=True)
    most = max(lengths["counts"])
    for low, high, count in zip(lengths["edges"], lengths["edges"][1:], lengths["counts"], strict=False):
        table.add_row(f"{low:,} to {high:,}", f"{count:,}", Text(bar_text(count / most), style="blue"))
    trained = lengths["num_targets"] / lengths["num_tokens"]
    packed = f" of {lengths['num_rows']:,} rows" if lengths["num_rows"] != lengths["num_sequences"] else ""
    said = (
        f"{lengths['num_sequences']:,} sequences{packed}, {lengths['num_tokens']:,} tokens, {trained:.1%} of them "
        f"trained; the longest has {lengths['longest']:,} of seq_len {lengths['seq_len']:,}; padding of an epoch's "
        f"batches: {found['padding_frac']:.1%}"
    )
    if found["template"] is not None:
        said += f"; chat template: the {found['template']}"
    return Group(table, Text(said))


def _examples(found: dict[str, Any]) -> Iterator[RenderableType]:
    for example in found["examples"]:
        yield ""
        yield Text(
            f"{example['where']}: {example['num_tokens']} tokens, {example['num_targets']} trained", style="bold"
        )
        yield _coloured(example["pieces"])


def _coloured(pieces: list[dict[str, Any]]) -> Text:
    text = Text()
    for piece in pieces:
        if piece["begins_document"]:
            text.append("\n" + "─" * BAR_WIDTH + "\n", style="dim")
        if piece["trained"]:
            text.append(_MARKS[0] + piece["text"] + _MARKS[1], style=TRAINED_STYLE)
        else:
            text.append(piece["text"], style="dim")
    return text
