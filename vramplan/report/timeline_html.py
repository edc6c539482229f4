"""A simulation's timeline as one HTML page: SVG, with a few lines of script for hovering; nothing is fetched."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path

from vramplan.simulate.result import CATEGORY_ORDER, SimulationResult, Timeline
from vramplan.units import format_bytes

WIDTH, HEIGHT = 1200, 480
LEFT, BOTTOM, TOP = 80, 80, 20
HEADROOM = 1.05
"""The highest value reaches this share of the plot's height, inverted."""
COLOURS = (
    "#4c78a8",
    "#f58518",
    "#54a24b",
    "#e45756",
    "#72b7b2",
    "#eeca3b",
    "#b279a2",
    "#ff9da6",
    "#9d755d",
    "#bab0ac",
)


def write_timeline_page(result: SimulationResult, path: Path, title: str) -> None:
    """Writes the page."""
    path.write_text(timeline_page(result, title), encoding="utf-8")


def timeline_page(result: SimulationResult, title: str) -> str:
    """The whole page."""
    heading = escape(title)
    table = "".join(
        f"<tr><td>{format_bytes(group.num_bytes)}</td><td>{group.count}</td><td>{escape(group.category)}</td>"
        f"<td>{escape(' '.join(filter(None, (group.birth.module, group.birth.node or group.birth.op))))}</td>"
        f"<td>{escape(group.birth.frame)}</td></tr>"
        for group in result.largest_live[:30]
    )
    return (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{heading}</title><style>{_STYLE}</style>'
        f"</head><body><h1>{heading}</h1><p>{escape(_sentence(result))}</p>{_legend(result.timeline)}"
        f'<div id="plot">{timeline_svg(result)}<div id="tip" hidden></div></div>'
        f"<h2>Largest live at the peak ({escape(result.peak.phase)})</h2>"
        "<table><thead><tr><th>bytes</th><th>blocks</th><th>category</th><th>born in</th><th>line</th></tr></thead>"
        f"<tbody>{table}</tbody></table>"
        f'<script type="application/json" id="data">{_data(result.timeline)}</script><script>{_SCRIPT}</script>'
        "</body></html>\n"
    )


def timeline_svg(result: SimulationResult) -> str:
    """The stacked areas, the phases' names, and the line of the capacity."""
    timeline = result.timeline
    names = ordered_categories(timeline)
    levels = _stack([timeline.categories[name] for name in names])
    room = _room_bytes(result)
    highest = max(max(levels[-1], default=0), room or 0, 1) * HEADROOM
    count = max(len(levels[-1]), 1)

    def x(stretch: float) -> float:
        return LEFT + (WIDTH - LEFT) * stretch / count

    def y(num_bytes: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - num_bytes / highest)

    def edge(level: Sequence[int]) -> list[str]:
        return [f"{x(at):.1f},{y(size):.1f}" for stretch, size in enumerate(level) for at in (stretch, stretch + 1)]

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" data-left="{LEFT}" data-width="{WIDTH}">']
    for number, name in enumerate(names):
        points = " ".join(edge(levels[number + 1]) + edge(levels[number])[::-1])
        colour = COLOURS[number % len(COLOURS)]
        parts.append(f'<polygon points="{points}" fill="{colour}"><title>{escape(name)}</title></polygon>')
    for share in (0.25, 0.5, 0.75, 1.0):
        size = int(highest / HEADROOM * share)
        parts.append(f'<text x="{LEFT - 6}" y="{y(size) + 4:.1f}" text-anchor="end">{format_bytes(size)}</text>')
    for phase, first, _ in timeline.phases:
        at, foot = x(first), HEIGHT - BOTTOM
        parts.append(f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{foot}" class="phase"/>')
        parts.append(
            f'<text transform="translate({at + 4:.1f},{foot + 10}) rotate(20)" class="name">{escape(phase)}</text>'
        )
    if room is not None:
        label = f"capacity {format_bytes(room)}"
        parts.append(f'<line id="capacity" x1="{LEFT}" x2="{WIDTH}" y1="{y(room):.1f}" y2="{y(room):.1f}"/>')
        parts.append(f'<text x="{LEFT + 6}" y="{y(room) - 4:.1f}">{label}</text>')
    parts.append(f'<line id="cursor" x1="0" x2="0" y1="{TOP}" y2="{HEIGHT - BOTTOM}" visibility="hidden"/></svg>')
    return "".join(parts)


def ordered_categories(timeline: Timeline) -> list[str]:
    """Those that have bytes, in the order in which they are stacked."""
    return [name for name in CATEGORY_ORDER if name in timeline.categories]


def _room_bytes(result: SimulationResult) -> int | None:
    """What tensors may take of the capacity."""
    return None if result.capacity_bytes is None else result.capacity_bytes - result.overhead_bytes


def _stack(series: Sequence[Sequence[int]]) -> list[list[int]]:
    """The lower edge of the first series, then every series' upper edge."""
    levels = [[0] * len(series[0])] if series else [[]]
    for values in series:
        levels.append([below + value for below, value in zip(levels[-1], values, strict=True)])
    return levels


def _sentence(result: SimulationResult) -> str:
    parts = [f"Peak {format_bytes(result.allocated_peak_bytes)} allocated, in {result.peak.phase}"]
    if result.reserved_peak_bytes is not None:
        parts.append(f"{format_bytes(result.reserved_peak_bytes)} reserved by the caching allocator")
    if result.failure is not None:
        failure = result.failure
        parts.append(f"the first allocation that fails: {format_bytes(failure.num_bytes)} in {failure.phase}")
    if result.error is not None:
        parts.append(f"not traced to its end: {result.error}")
    return "; ".join(parts) + "."


def _legend(timeline: Timeline) -> str:
    marks = "".join(
        f'<span><i style="background:{COLOURS[number % len(COLOURS)]}"></i>{escape(name)}</span>'
        for number, name in enumerate(ordered_categories(timeline))
    )
    return f'<p class="legend">{marks}</p>'


def _data(timeline: Timeline) -> str:
    names = ordered_categories(timeline)
    data = {
        "categories": [[name, timeline.categories[name]] for name in names],
        "phases": timeline.phases,
        "births": timeline.births,
        "largest": timeline.largest,
    }
    return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")


_STYLE = """
body{font:14px system-ui,sans-serif;margin:1.5em;max-width:1300px}h1{font-size:1.3em}h2{font-size:1.1em}
#plot{position:relative}svg{width:100%}svg text{font-size:11px;fill:#444}.phase{stroke:#fff;stroke-opacity:.7}
#capacity{stroke:#c62828;stroke-width:2;stroke-dasharray:6 4}#cursor{stroke:#000}
#tip{position:absolute;background:#fffd;border:1px solid #888;padding:.4em .6em;pointer-events:none;max-width:46em;
white-space:pre-line;font-size:12px}.legend span{margin-right:1em}.legend i{display:inline-block;width:.8em;
height:.8em;margin-right:.3em}table{border-collapse:collapse}td,th{padding:.1em .6em;text-align:left}
td:first-child{white-space:nowrap}
"""
_SCRIPT = """
const data = JSON.parse(document.getElementById("data").textContent);
const svg = document.querySelector("#plot svg"), tip = document.getElementById("tip");
const cursor = document.getElementById("cursor"), left = +svg.dataset.left, width = +svg.dataset.width;
const count = data.largest.length || (data.categories[0] ? data.categories[0][1].length : 0);
const text = n => n >= 2**30 ? (n / 2**30).toFixed(2) + " GiB" : (n / 2**20).toFixed(1) + " MiB";
svg.addEventListener("mousemove", event => {
  const box = svg.getBoundingClientRect(), x = (event.clientX - box.left) * width / box.width;
  const at = Math.floor((x - left) / (width - left) * count);
  if (at < 0 || at >= count) { tip.hidden = true; return; }
  const inside = data.phases.filter(([, first, end]) => first <= at && at < end).map(phase => phase[0]);
  const shown = data.categories.filter(([, sizes]) => sizes[at] > 0).map(([name, sizes]) => [name, sizes[at]]);
  const total = shown.reduce((sum, item) => sum + item[1], 0);
  const lines = [(inside.pop() || "") + ": " + text(total), ...shown.map(([name, size]) => name + ": " + text(size)),
    "", ...(data.largest[at] || []).map(([birth, size]) => text(size) + "  " + data.births[birth])];
  tip.textContent = lines.join("\\n");
  tip.hidden = false;
  tip.style.left = Math.min(event.clientX - box.left + 14, box.width * .55) + "px";
  tip.style.top = (event.clientY - box.top + 14) + "px";
  cursor.setAttribute("x1", x); cursor.setAttribute("x2", x); cursor.setAttribute("visibility", "visible");
});
svg.addEventListener("mouseleave", () => { tip.hidden = true; cursor.setAttribute("visibility", "hidden"); });
"""
