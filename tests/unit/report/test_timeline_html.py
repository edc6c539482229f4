"""The page of a simulation: whole by itself, true to the result, and drawn in order."""

import json
import re
from dataclasses import replace
from xml.etree import ElementTree

import pytest

from vramplan.memory.birth import Birth
from vramplan.memory.term import Category
from vramplan.report.timeline_html import BOTTOM, HEIGHT, timeline_page, timeline_svg, write_timeline_page
from vramplan.simulate.result import SimulationResult
from vramplan.simulate.summary import Curves, largest_live, make_timeline, summarise_phases
from vramplan.simulate.trace import CATEGORIES, PhaseSpan, Trace
from vramplan.units import GIB, MIB


@pytest.fixture
def result():
    """A weight of 300 MiB that stays and an activation of 200 MiB that dies."""
    trace = Trace(births=[Birth(op="aten.empty", module="model.embed"), Birth(op="aten.mm", frame="a.py:1 <forward>")])
    weight = trace.bear(300 * MIB, 0)
    activation = trace.bear(200 * MIB, 1)
    trace.bury(activation)
    trace.category[weight] = CATEGORIES.index(Category.PARAMETER)
    trace.category[activation] = CATEGORIES.index(Category.ACTIVATION)
    trace.phases = [PhaseSpan("model_load", 0, 1), PhaseSpan("step1.micro1.forward", 1, 3)]
    curves = Curves.of(trace)
    return SimulationResult(
        device_type="cuda",
        phases=summarise_phases(trace, curves, None),
        largest_live=largest_live(trace, curves),
        timeline=make_timeline(trace, curves),
        numel_total=1,
        numel_trainable=1,
        num_blocks=2,
        seconds=0.0,
        capacity_bytes=GIB,
    )


def data_of(page):
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL).group(1))


def test_the_page_fetches_nothing(result):
    page = timeline_page(result, "a <run>")
    assert not re.search(r"https?:|src=|href=|@import|url\(|fetch\(|import ", page)
    assert "<title>a &lt;run&gt;</title>" in page


def test_hovering_names_the_tensors_of_each_stretch(result):
    data = data_of(timeline_page(result, "run"))
    named = [[(data["births"][birth], size // MIB) for birth, size in row] for row in data["largest"]]
    weight, activation = ("model.embed · aten.empty", 300), ("aten.mm · a.py:1 <forward>", 200)
    assert named == [[], [weight], [weight, activation], [weight]]
    assert dict(data["categories"])["parameter"] == [0, 300 * MIB, 300 * MIB, 300 * MIB]
    assert dict(data["categories"])["activation"] == [0, 0, 200 * MIB, 0]


def test_areas_are_stacked_to_scale_below_the_capacity(result):
    svg = ElementTree.fromstring(timeline_svg(result))
    heights = {}
    for area in svg.iter("polygon"):
        points = [tuple(map(float, point.split(","))) for point in area.get("points").split()]
        top, bottom = points[: len(points) // 2], points[len(points) // 2 :][::-1]
        heights[area.find("title").text] = [round(low[1] - high[1], 1) for high, low in zip(top, bottom, strict=True)]
    assert heights["activation"][4] == pytest.approx(heights["parameter"][4] * 2 / 3, abs=0.15)
    assert heights["activation"][:4] == [0, 0, 0, 0]
    capacity = next(line for line in svg.iter("line") if line.get("id") == "capacity")
    foot = HEIGHT - BOTTOM
    assert (foot - float(capacity.get("y1"))) * 300 / 1024 == pytest.approx(heights["parameter"][4], abs=0.15)


def test_without_a_capacity_there_is_no_line(result):
    assert 'id="capacity"' not in timeline_svg(replace(result, capacity_bytes=None))


def test_a_result_survives_the_way_between_processes(result, tmp_path):
    again = SimulationResult.from_dict(json.loads(json.dumps(result.to_dict())))
    assert again.timeline == result.timeline
    write_timeline_page(again, tmp_path / "a.html", "run")
    assert (tmp_path / "a.html").read_text(encoding="utf-8") == timeline_page(result, "run")
