"""What stands for layers that are not run: the bytes that a layer of their kind keeps."""

from __future__ import annotations

from vramplan.memory.blocks.balance import SCORES
from vramplan.memory.blocks.context import BlockContext
from vramplan.memory.labels import GATHER_BUFFER, GATHERED, SECONDARY
from vramplan.memory.size import ZERO, Size, add, sub
from vramplan.memory.tape import Point


def less(point: Point, freed: dict[str, Size], grad_numel: int, where: str) -> Point:
    """An instant of one layer as that of another below it, which has less alive by ``freed``."""
    by_label, total = dict(point.by_label), point.total
    for label, size in freed.items():
        if label in by_label:
            by_label[label], total = sub(by_label[label], size), sub(total, size)
    return Point(where, point.index, total, by_label, grad_numel)


def add_kept(total: dict[str, Size], costs: dict[str, Size], elsewhere: dict[str, bool]) -> None:
    """Adds up what layers keep in the graph, without headings that are kept ``elsewhere``."""
    for label, size in costs.items():
        if not elsewhere.get(label):
            total[label] = add(total.get(label, ZERO), size)


def difference(after: dict[str, Size], before: dict[str, Size]) -> dict[str, Size]:
    """What a layer keeps: the bytes of every heading that it changed."""
    labels = {*after, *before}
    # whole weights come and go with the layers that are run, scores of routers with the model's output
    labels -= {GATHERED, GATHER_BUFFER, SECONDARY, SCORES}
    changes = {label: sub(after.get(label, ZERO), before.get(label, ZERO)) for label in labels}
    return {label: size for label, size in changes.items() if size != ZERO}


def held_by_graph(ctx: BlockContext) -> dict[str, Size]:
    """What is alive, without attention weights that the model alone holds."""
    held = dict(ctx.tape.by_label)
    output = ctx.output.storage if ctx.output is not None else None
    if output is not None and output.refs == 1:
        held[output.label] = sub(held[output.label], output.size)
    return held


def hold_output_of_skipped(ctx: BlockContext, recomputed: bool) -> None:
    """The model holds the attention weights of a layer that is not run: bytes of their own where the layer is
    recomputed, else those of the graph."""
    output, ctx.output = ctx.output, None
    if output is not None and recomputed:
        numel, dtype, label = output.numel, output.dtype, output.storage.label
        del output
        ctx.output = ctx.tape.new(numel, dtype, label)
