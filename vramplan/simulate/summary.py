"""A trace -> phases, categories at peaks, largest live tensors, timeline, and the allocator's replay. No torch."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vramplan.memory.birth import Birth
from vramplan.memory.term import Category, Place
from vramplan.simulate.pinned import pinned_curve
from vramplan.simulate.replay import Replay
from vramplan.simulate.result import LiveGroup, SimulatedPhase, Timeline
from vramplan.simulate.trace import CATEGORIES, Trace

LIVE_GROUPS = 100
"""Groups of live tensors kept, largest first."""
TIMELINE_STRETCHES = 400
TIMELINE_TENSORS = 6
"""Groups of live tensors named in each stretch of a timeline."""


@dataclass(frozen=True, slots=True)
class Curves:
    """Bytes alive after each instant."""

    device: npt.NDArray[np.int64]
    host: npt.NDArray[np.int64]
    """Tensors that can be paged, and what torch holds for pinned ones."""
    pinned: npt.NDArray[np.int64]
    """Of ``host``, what torch holds for pinned tensors."""
    by_category: tuple[npt.NDArray[np.int64], ...]
    """On the device, in the order of ``CATEGORIES``."""

    @classmethod
    def of(cls, trace: Trace) -> Curves:
        on_device = trace.in_place(Place.DEVICE)
        by_category = tuple(trace.live_curve(on_device & trace.in_category(category)) for category in CATEGORIES)
        device = np.sum(by_category, axis=0)
        pinned = pinned_curve(trace)
        return cls(device, trace.live_curve(trace.in_place(Place.HOST)) + pinned, pinned, by_category)

    def categories_at(self, instant: int) -> dict[str, int]:
        """Bytes of each category that has any."""
        found = {
            category.value: int(curve[instant]) for category, curve in zip(CATEGORIES, self.by_category, strict=True)
        }
        return {name: num_bytes for name, num_bytes in found.items() if num_bytes}


def summarise_phases(trace: Trace, curves: Curves, replay: Replay | None) -> tuple[SimulatedPhase, ...]:
    """Every phase with its peak, end, categories at the peak, and the allocator's reserved bytes."""
    phases = []
    for span in trace.phases:
        stretch = slice(span.start, span.end + 1)
        peak_at = span.start + int(np.argmax(curves.device[stretch]))
        host_at = span.start + int(np.argmax(curves.host[stretch]))
        phases.append(
            SimulatedPhase(
                phase=span.name,
                peak_bytes=int(curves.device[peak_at]),
                end_bytes=int(curves.device[span.end]),
                categories=curves.categories_at(peak_at),
                reserved_peak_bytes=replay.reserved_peak_bytes(span.start, span.end) if replay else None,
                host_peak_bytes=int(curves.host[host_at]),
                pinned_bytes=int(curves.pinned[host_at]),
            )
        )
    return tuple(phases)


def largest_live(trace: Trace, curves: Curves) -> tuple[LiveGroup, ...]:
    """Groups of blocks alive at the highest instant, of one category and birthplace each."""
    groups: dict[tuple[Birth, Category], list[int]] = {}
    for block in trace.live_at(int(np.argmax(curves.device))).tolist():
        key = (trace.births[trace.birth[block]], CATEGORIES[trace.category[block]])
        groups.setdefault(key, []).append(trace.num_bytes[block])
    found = [
        LiveGroup(sum(sizes), len(sizes), max(sizes), category.value, birth)
        for (birth, category), sizes in groups.items()
    ]
    return tuple(sorted(found, key=lambda group: -group.num_bytes)[:LIVE_GROUPS])


def make_timeline(trace: Trace, curves: Curves, num_stretches: int = TIMELINE_STRETCHES) -> Timeline:
    """The curves in ``num_stretches`` stretches, each shown at its highest instant so that no peak is lost."""
    num_instants = len(curves.device)
    num_stretches = min(num_stretches, num_instants)
    edges = np.linspace(0, num_instants, num_stretches + 1).astype(np.int64)
    highest = [int(start + np.argmax(curves.device[start:end])) for start, end in itertools.pairwise(edges.tolist())]
    categories = {
        category.value: tuple(curve[highest].tolist())
        for category, curve in zip(CATEGORIES, curves.by_category, strict=True)
        if curve.any()
    }
    births, largest = _largest_at(trace, highest)
    return Timeline(categories, tuple(_phase_stretches(trace, edges)), births, largest)


def _largest_at(
    trace: Trace, instants: Sequence[int]
) -> tuple[tuple[str, ...], tuple[tuple[tuple[int, int], ...], ...]]:
    """At each instant the largest groups of live blocks of one birthplace, and the birthplaces named."""
    sizes, births = np.array(trace.num_bytes, np.int64), np.array(trace.birth, np.int64)
    numbers: dict[str, int] = {}
    rows = []
    for instant in instants:
        live = trace.live_at(instant)
        groups = np.bincount(births[live], weights=sizes[live], minlength=1).astype(np.int64)
        top = [int(birth) for birth in np.argsort(-groups)[:TIMELINE_TENSORS] if groups[birth]]
        lines = [(_one_line(trace.births[birth]), int(groups[birth])) for birth in top]
        rows.append(tuple((numbers.setdefault(line, len(numbers)), size) for line, size in lines))
    return tuple(numbers), tuple(rows)


def _one_line(birth: Birth) -> str:
    parts = (birth.module, birth.node or birth.op, birth.frame, birth.phase)
    return " · ".join(part for part in parts if part) or "unknown"


def _phase_stretches(trace: Trace, edges: npt.NDArray[np.int64]) -> Sequence[tuple[str, int, int]]:
    return [
        (
            span.name,
            max(0, int(np.searchsorted(edges, span.start, side="right")) - 1),
            int(np.searchsorted(edges, span.end, side="left")),
        )
        for span in trace.phases
    ]
